#pragma once
// What a training run saves and how it comes back. Rank 0 alone writes; a sharded optimizer's state is
// gathered on it first, so that a checkpoint does not depend on the sharding. Every rank reads.
#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "checkpoints/checkpoint.h"
#include "comm/communicator.h"
#include "configs/config.h"
#include "trainer/model/model.h"

namespace trainer {

// What the run has done so far, besides weights, moments and the optimizer's state.
struct Progress {
  int64_t tokens = 0;
  int64_t best_step = -1;
  double best_validation_loss = 0;
};

class Checkpointing {
 public:
  Checkpointing(const configs::Config& config, comm::Communicator& ranks, Model& model, std::string tokenizer,
                std::string tokenizer_hash);

  // The checkpoint to go on from by `resume` (none | auto | path), the same on every rank; empty to start
  // afresh. ConfigError when the run already has steps and resume is none, or newer ones than the step that
  // resume names.
  std::filesystem::path choose(const std::string& resume) const;
  // Reads it into the model and its optimizer; CheckpointError when it belongs to another model or tokenizer.
  Progress restore(const std::filesystem::path& checkpoint);

  // Starts a background save on rank 0; called by all ranks. An earlier save still being written is waited
  // for and committed first.
  void save(const Progress& progress);
  // Settles a save that is no longer being written, as finish() does. Called between steps. Returns its path,
  // else empty.
  std::filesystem::path poll(const Progress& progress);
  // Waits for the save in flight and commits it; CheckpointError when it failed and `must` is set, a warning
  // otherwise.
  std::filesystem::path finish(const Progress& progress, bool must);

 private:
  // One tensor of the training state: a parameter's part of a flat buffer; the optimizer's state where
  // parameter is -1.
  struct Item {
    std::string name;
    kernels::Tensor flat;
    int parameter;
    kernels::Shape shape;
  };
  std::vector<Item> items() const;
  kernels::OptimizerState state() const;
  checkpoints::Attributes attributes(const Progress& progress) const;
  bool prepare(const Progress& progress, std::vector<kernels::Tensor>& places);
  void collect(const Item& item, const kernels::Tensor& place, std::vector<char>& staging) const;
  void failed(const std::string& reason);
  void refuse_newer_steps(const std::filesystem::path& chosen) const;
  void remove_old(const Progress& progress) const;

  const configs::Config& config_;
  comm::Communicator& ranks_;
  Model& model_;
  std::string tokenizer_, tokenizer_hash_;
  std::filesystem::path directory_;
  std::unique_ptr<checkpoints::Writer> writer_;  // rank 0
  bool begun_ = false;                           // a save, which finish() has not settled yet
  std::string last_failure_;                     // why the latest save could not even start
};

}  // namespace trainer

#pragma once
// The training job of one rank.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "configs/config.h"
#include "kernels/core/context.h"

namespace trainer {

enum class StopReason { finished, asked_to_stop };

struct TrainOptions {
  bool progress_bar = false;    // a line redrawn in place, for terminals; plain lines otherwise
  std::string resume = "none";  // none | auto | a checkpoint's path
  // Set (by a signal handler) when the job should save and stop.
  std::function<bool()> stop_requested = [] { return false; };
  // Called on rank 0 with each checkpoint's path once it is committed: launch hangs a text sample on it.
  std::function<void(const std::filesystem::path&)> on_checkpoint = [](const std::filesystem::path&) {};
};

struct TrainResult {
  StopReason reason = StopReason::finished;
  int64_t step = 0;
  std::filesystem::path checkpoint;
};

TrainResult train(const configs::Config& config, comm::Communicator& ranks, const kernels::Context& ctx,
                  const TrainOptions& options);

// What a run of this configuration would need and do on the device of `ctx`, without data or training: memory
// by segment from a rehearsal of one step on the largest batch shape, parameters, operations per token and an
// estimated time of a step.
struct Plan {
  struct Row {
    std::string segment, name;
    int64_t bytes;
  };
  std::vector<Row> rows;
  int64_t parameters = 0, total_bytes = 0, free_bytes = 0;
  std::string device, problem;  // problem: why it does not fit and what would help; empty when it does
  int64_t micro_batches_per_rank = 0;
  double flop_per_token = 0, tokens_per_step = 0, seconds_per_step = 0;
};
Plan plan(const configs::Config& config, int64_t vocabulary, int ranks, const kernels::Context& ctx = {});

// The part of a plan that is about memory; quick.
Plan plan_memory(const configs::Config& config, int64_t vocabulary, int ranks, const kernels::Context& ctx);

}  // namespace trainer

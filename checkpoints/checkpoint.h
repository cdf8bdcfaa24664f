#pragma once
// A checkpoint is a directory `step_NNNNNNNN` of HDF5 shards and a manifest. It is complete or absent,
// verified by checksums, and independent of the number of ranks and of any communicator: the trainer calls
// prepare on the ranks that write, agrees with the others, then commits.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/core/tensor.h"

namespace checkpoints {

using kernels::Tensor;

// What a checkpoint holds besides tensors: everything needed to go on. Text and 64-bit integers only.
struct Attributes {
  std::map<std::string, std::string> text;  // "config", "tokenizer", "tokenizer_hash", "version", ...
  std::map<std::string, int64_t> integers;  // "step", "updates", "tokens", ...
};

// Whether a checkpoint may be read while another one is being written: not with every build of HDF5.
bool reads_beside_writes();

struct NamedTensor {
  std::string name;  // "master/blocks.0.attention.q.weight", "m/...", "v/...", "state/optimizer": '/' makes
                     // HDF5 groups
  Tensor tensor;     // host memory
};

// Writes in the background into `.tmp-step_...` below `directory`: slabs of about 1 MiB, then fsync, then
// reads back and verifies every tensor. The tensors are copied before start() returns, so training can go on
// at once. fp32, fp64, int32, int64 and uint8 tensors of at least one dimension.
class Writer {
 public:
  Writer(std::filesystem::path directory, int shards);
  ~Writer();  // waits for the thread; an uncommitted save is removed
  // CheckpointError when there is not enough free space, a name or type cannot be stored, or the last save
  // has not been committed or discarded; nothing is left behind then.
  void start(int64_t step, const Attributes& attributes, const std::vector<NamedTensor>& tensors);
  // The same in two parts, for values that lie elsewhere (on a GPU, on other ranks): prepare() takes memory
  // for tensors of these names, types and shapes and returns it, dense, in their order; begin() starts the
  // save once the caller has filled it.
  std::vector<Tensor> prepare(int64_t step, const Attributes& attributes,
                              const std::vector<NamedTensor>& tensors);
  void begin();
  bool busy() const;     // a save is being written
  bool written() const;  // a save is complete and waits for commit or discard
  // Waits; returns false with a reason when the save failed (training goes on with a warning).
  bool wait(std::string& reason);
  // After all ranks agreed: manifest, fsync, rename, `latest` (a hint, which may fail). Returns the
  // checkpoint's path. A checkpoint of the same step is replaced. CheckpointError when that fails; the save
  // is discarded then.
  std::filesystem::path commit();
  void discard();  // waits, then removes what was written

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

class Reader {
 public:
  // Verifies manifest, files and every tensor; CheckpointError names the file, the tensor and what to do.
  explicit Reader(const std::filesystem::path& checkpoint);
  ~Reader();
  int64_t step() const;
  const Attributes& attributes() const;
  std::vector<std::string> names() const;
  bool contains(const std::string& name) const;
  kernels::Shape shape(const std::string& name) const;
  kernels::DType dtype(const std::string& name) const;
  // Into host memory of exactly the stored type and shape.
  void read(const std::string& name, Tensor into) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The newest checkpoint below `directory` that verifies; empty path when there is no step directory at all;
// CheckpointError when there are some but none verifies. Bad ones are renamed to *.bad when `set_aside`, each
// reported to `warn`. One that cannot be read for a reason of the system's is not passed over: that error
// ends the search.
std::filesystem::path find_newest(const std::filesystem::path& directory, bool set_aside,
                                  const std::function<void(const std::string&)>& warn);
// RUN directory, its checkpoints folder (the newest that verifies), or a checkpoint itself (Reader verifies
// it) -> a checkpoint path. CheckpointError when there is none.
std::filesystem::path resolve(const std::filesystem::path& run_or_checkpoint,
                              const std::function<void(const std::string&)>& warn);
// Also true when all that is left was set aside as *.bad: then nothing may start from step 0 silently.
bool has_steps(const std::filesystem::path& directory);
// The highest step of which there is a folder, whole or not; -1 without any.
int64_t newest_step(const std::filesystem::path& directory);
// Keeps the newest `keep` (at least 2) that verify and everything newer than those, multiples of keep_every,
// and `best` (step, or -1); deletes the rest.
void retain(const std::filesystem::path& directory, int64_t keep, int64_t keep_every, int64_t best);

}  // namespace checkpoints

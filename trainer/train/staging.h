#pragma once
// Host values on their way to the device, through page-locked memory, and how a step's values lie in one
// block of either.
#include <compare>
#include <functional>
#include <memory>
#include <vector>

#include "data/batch_loader.h"
#include "kernels/core/context.h"
#include "kernels/core/stream.h"
#include "trainer/model/model.h"

namespace trainer {

// Waits on the host for a point in a stream, calling `meanwhile` again and again. The device does not wait:
// whoever calls this has put more work behind that point.
void wait_for(const kernels::Event& event, const std::function<void()>& meanwhile = {});

// Cuts a block into tensors, each at a multiple of 64 bytes; a block without memory is only measured.
class BlockCutter {
 public:
  explicit BlockCutter(void* block, kernels::Device device = {}) : block_(block), device_(device) {}
  kernels::Tensor take(kernels::DType dtype, kernels::Shape shape);
  size_t bytes() const { return used_; }

 private:
  void* block_;
  kernels::Device device_;
  size_t used_ = 0;
};

// Page-locked slots, filled in turn and copied in the stream's order: the host can fill one while the other
// is on its way.
class Uploads {
 public:
  Uploads(kernels::Device device, size_t bytes);
  // fill(slot) writes `bytes`, which then go to `target` on the device.
  void send(kernels::Stream stream, void* target, size_t bytes, const std::function<void(void*)>& fill);

 private:
  struct Slot {
    Slot(kernels::Device device, size_t bytes) : memory(device, bytes), copied(device) {}
    kernels::PinnedBuffer memory;
    kernels::Event copied;
  };
  kernels::Device device_;
  std::vector<std::unique_ptr<Slot>> slots_;
  size_t next_ = 0;
};

// The shape of a micro-batch on the device, from a finite set: empty sequences fill up the number of
// sequences. Uniform: all of them are as long as the context, and there is nothing else.
struct BatchShape {
  int64_t rows = 0, sequences = 0;
  bool uniform = false;
  auto operator<=>(const BatchShape&) const = default;
};
BatchShape shape_of(const data::Batch& batch, const data::LoaderParams& params);
// All there can be.
std::vector<BatchShape> batch_shapes(const data::LoaderParams& params);
ModelBatch cut_batch(BlockCutter& block, const BatchShape& shape, const data::LoaderParams& params);
size_t batch_bytes(const BatchShape& shape, const data::LoaderParams& params);
void pack_batch(const data::Batch& batch, const BatchShape& shape, const data::LoaderParams& params,
                void* block);

// What the host gives a step, and what ranks add up and agree on in it. Rank r of R.
struct StepNumbers {
  kernels::Tensor loss_sums;   // (losses) fp64, uploaded as 0; summed over ranks
  kernels::Tensor factors;     // (losses) fp32, of loss_seeds
  kernels::Tensor normaliser;  // (1) fp32
  // (1 + 2 R) int32, MAX over ranks: whether to stop; for each rank the first tensor that is not finite after
  // the reduction, or -1; for each rank its non-finite values before the reduction, where they are looked for
  kernels::Tensor agreed;
};
StepNumbers cut_numbers(BlockCutter& block, int64_t losses, int ranks);

}  // namespace trainer

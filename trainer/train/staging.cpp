#include "trainer/train/staging.h"

#include <algorithm>
#include <chrono>
#include <thread>

namespace trainer {

using kernels::DType;
using kernels::Tensor;

void wait_for(const kernels::Event& event, const std::function<void()>& meanwhile) {
  while (!event.done()) {
    if (meanwhile) meanwhile();
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

Tensor BlockCutter::take(DType dtype, kernels::Shape shape) {
  constexpr size_t kAlignment = 64;
  void* data = block_ ? static_cast<char*>(block_) + used_ : nullptr;
  const Tensor part(data, dtype, shape, device_);
  used_ += (part.bytes() + kAlignment - 1) / kAlignment * kAlignment;
  return part;
}

Uploads::Uploads(kernels::Device device, size_t bytes) : device_(device) {
  constexpr int kSlots = 2;
  for (int i = 0; i < kSlots; ++i) slots_.push_back(std::make_unique<Slot>(device, bytes));
}

void Uploads::send(kernels::Stream stream, void* target, size_t bytes,
                   const std::function<void(void*)>& fill) {
  Slot& slot = *slots_[next_++ % slots_.size()];
  wait_for(slot.copied);
  fill(slot.memory.data());
  kernels::copy_async(target, slot.memory.data(), bytes, device_, stream);
  slot.copied.record(stream);
}

BatchShape shape_of(const data::Batch& batch, const data::LoaderParams& params) {
  const int64_t rows = batch.rows(), sequences = static_cast<int64_t>(batch.cu_seqlens.size()) - 1;
  // No sequence is longer than the context, so that as many as fill the rows are all as long.
  if (sequences * params.context == rows) return {rows, sequences, true};
  return {rows, sequences <= params.micro_batch ? params.micro_batch : data::max_sequences(params), false};
}

std::vector<BatchShape> batch_shapes(const data::LoaderParams& params) {
  std::vector<BatchShape> shapes;
  for (const int64_t rows : data::row_buckets(params)) {
    for (const int64_t sequences : {params.micro_batch, data::max_sequences(params)})
      shapes.push_back({rows, sequences, false});
    if (rows % params.context == 0) shapes.push_back({rows, rows / params.context, true});
  }
  return shapes;
}

ModelBatch cut_batch(BlockCutter& block, const BatchShape& shape, const data::LoaderParams& params) {
  ModelBatch batch;
  batch.tokens = block.take(DType::i32, {shape.rows});
  batch.positions = block.take(DType::i32, {shape.rows});
  batch.cu_seqlens = block.take(DType::i32, {shape.sequences + 1});
  batch.targets = block.take(DType::i32, {params.offsets, shape.rows});
  batch.weights = block.take(DType::f32, {params.offsets, shape.rows});
  batch.hints.longest = params.context;
  batch.hints.uniform = shape.uniform;
  return batch;
}

size_t batch_bytes(const BatchShape& shape, const data::LoaderParams& params) {
  BlockCutter measure(nullptr);
  cut_batch(measure, shape, params);
  return measure.bytes();
}

void pack_batch(const data::Batch& batch, const BatchShape& shape, const data::LoaderParams& params,
                void* block) {
  BlockCutter cutter(block);
  const ModelBatch to = cut_batch(cutter, shape, params);
  std::copy(batch.tokens.begin(), batch.tokens.end(), to.tokens.as<int32_t>());
  std::copy(batch.positions.begin(), batch.positions.end(), to.positions.as<int32_t>());
  int32_t* cu = std::copy(batch.cu_seqlens.begin(), batch.cu_seqlens.end(), to.cu_seqlens.as<int32_t>());
  std::fill(cu, to.cu_seqlens.as<int32_t>() + shape.sequences + 1, batch.cu_seqlens.back());
  std::copy(batch.targets.begin(), batch.targets.end(), to.targets.as<int32_t>());
  std::copy(batch.weights.begin(), batch.weights.end(), to.weights.as<float>());
}

StepNumbers cut_numbers(BlockCutter& block, int64_t losses, int ranks) {
  StepNumbers numbers;
  numbers.loss_sums = block.take(DType::f64, {losses});
  numbers.factors = block.take(DType::f32, {losses});
  numbers.normaliser = block.take(DType::f32, {1});
  numbers.agreed = block.take(DType::i32, {1 + 2 * int64_t{ranks}});
  return numbers;
}

}  // namespace trainer

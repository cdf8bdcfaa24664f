#include "trainer/decode/perplexity.h"

#include <algorithm>
#include <cmath>

#include "data/batch_loader.h"

namespace trainer {

namespace {

// Host vectors where the device can read them: in place on the CPU, in `memory` otherwise.
template <typename T>
Tensor upload(const std::vector<T>& values, Shape shape, kernels::Device device, kernels::Arena& memory) {
  const Tensor host(const_cast<T*>(values.data()), kernels::dtype_of<T>(), shape);
  if (!device.is_cuda()) return host;
  const Tensor there = memory.allocate("batch", host.dtype, shape);
  if (!memory.measuring()) kernels::copy_bytes(there.data, device, host.data, {}, host.bytes());
  return there;
}

ModelBatch upload(const data::Batch& batch, kernels::Device device, kernels::Arena& memory) {
  const int64_t n = batch.rows(), k = batch.offsets;
  return {upload(batch.tokens, {n}, device, memory), upload(batch.positions, {n}, device, memory),
          upload(batch.cu_seqlens, {static_cast<int64_t>(batch.cu_seqlens.size())}, device, memory),
          upload(batch.targets, {k, n}, device, memory), upload(batch.weights, {k, n}, device, memory)};
}

// A batch of the largest shape, to measure memory with.
data::Batch largest_batch(const data::BatchLoader& loader, int64_t sequences, int64_t offsets) {
  const size_t n = static_cast<size_t>(loader.row_buckets().back());
  data::Batch batch;
  batch.tokens.resize(n);
  batch.positions.resize(n);
  batch.cu_seqlens.resize(static_cast<size_t>(sequences) + 2);
  batch.offsets = offsets;
  batch.targets.resize(n * offsets);
  batch.weights.resize(n * offsets);
  return batch;
}

}  // namespace

Perplexity measure_perplexity(const Context& given, const LoadedModel& loaded,
                              const data::TokenDataset& dataset, int64_t max_batches) {
  const Model& model = *loaded.model;
  const configs::Config& config = loaded.config;
  const int64_t count = static_cast<int64_t>(model.losses().size());
  data::LoaderParams params;
  params.batch = params.micro_batch = config.train.micro_batch;
  params.context = config.model.context;
  params.offsets = model.offsets();
  const data::BatchLoader loader(dataset, params);

  kernels::Arena saved("evaluation saved", given.device), scratch("evaluation scratch", given.device),
      inputs("evaluation batch", given.device);
  Context ctx = given;
  ctx.scratch = &scratch;
  std::vector<double> sums(count), batch_sums(count), weights(model.offsets());
  const Tensor sums_on_device = [&] {
    const data::Batch largest = largest_batch(loader, params.micro_batch, params.offsets);
    ctx.rehearsal = true;
    const Tensor out = inputs.allocate("losses", DType::f64, {count});
    model.evaluate(ctx, upload(largest, given.device, inputs), saved, out);
    ctx.rehearsal = false;
    saved.place();
    scratch.place();
    inputs.place();
    return inputs.allocate("losses", DType::f64, {count});
  }();

  int64_t batches = 0;
  for (const auto& samples : loader.all_micro_batches()) {
    if (max_batches > 0 && batches++ == max_batches) break;
    const data::Batch batch = loader.load(samples);
    const kernels::ArenaScope scope(inputs);
    std::fill(batch_sums.begin(), batch_sums.end(), 0.0);
    kernels::copy_bytes(sums_on_device.data, given.device, batch_sums.data(), {}, sums_on_device.bytes());
    model.evaluate(ctx, upload(batch, given.device, inputs), saved, sums_on_device);
    kernels::copy_bytes(batch_sums.data(), {}, sums_on_device.data, given.device, sums_on_device.bytes());
    for (int64_t i = 0; i < count; ++i) sums[i] += batch_sums[i];
    for (int64_t k = 0; k < params.offsets; ++k)
      for (int64_t i = 0; i < batch.rows(); ++i) weights[k] += batch.weights[k * batch.rows() + i];
  }

  Perplexity result;
  if (weights[0] <= 0)
    throw kernels::DataError(
        "the validation split holds no text to predict: prepare with a larger "
        "--val-fraction");
  for (int64_t i = 0; i < count; ++i) {
    const double weight = weights[model.losses()[i].offset];
    result.losses.push_back(weight > 0 ? sums[i] / weight : 0);
  }
  result.tokens = static_cast<int64_t>(weights[0]);
  result.loss = result.losses[0];
  result.perplexity = std::exp(result.loss);
  // Every token of a document but its first is predicted; the bytes are those of the whole text.
  const double predicted = static_cast<double>(dataset.tokens() - dataset.documents());
  result.bits_per_byte = result.loss / std::log(2.0) * std::max(predicted, 1.0) /
                         static_cast<double>(std::max<int64_t>(dataset.bytes(), 1));
  return result;
}

}  // namespace trainer

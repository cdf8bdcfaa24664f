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

// Empty sequences fill up their number, so that every batch of as many rows has one shape.
ModelBatch upload(const data::Batch& batch, const data::LoaderParams& params, std::vector<int32_t>& starts,
                  kernels::Device device, kernels::Arena& memory) {
  const int64_t n = batch.rows(), k = batch.offsets, sequences = data::max_sequences(params);
  starts.assign(batch.cu_seqlens.begin(), batch.cu_seqlens.end());
  starts.resize(static_cast<size_t>(sequences) + 1, starts.back());
  return {upload(batch.tokens, {n}, device, memory),       upload(batch.positions, {n}, device, memory),
          upload(starts, {sequences + 1}, device, memory), upload(batch.targets, {k, n}, device, memory),
          upload(batch.weights, {k, n}, device, memory),   {.longest = params.context}};
}

// A batch to measure memory with.
data::Batch empty_batch(int64_t rows, int64_t offsets) {
  const size_t n = static_cast<size_t>(rows);
  data::Batch batch;
  batch.tokens.resize(n);
  batch.positions.resize(n);
  batch.cu_seqlens.resize(1);
  batch.offsets = offsets;
  batch.targets.resize(n * offsets);
  batch.weights.resize(n * offsets);
  return batch;
}

// The forward with losses, its memory sized for every shape of a batch.
class Evaluator {
 public:
  Evaluator(const Context& ctx, const Model& model, const data::BatchLoader& loader)
      : model_(model),
        params_(loader.params()),
        ctx_(ctx),
        saved_("evaluation saved", ctx.device),
        scratch_("evaluation scratch", ctx.device),
        inputs_("evaluation batch", ctx.device),
        losses_(model.losses().size()) {
    ctx_.scratch = &scratch_;
    ctx_.rehearsal = true;
    allocate();
    for (const int64_t rows : data::row_buckets(params_)) {
      const kernels::ArenaScope scope(inputs_);
      const data::Batch batch = empty_batch(rows, model.offsets());
      model.evaluate(ctx_, upload(batch, params_, starts_, ctx.device, inputs_), saved_, sums_);
    }
    ctx_.rehearsal = false;
    for (kernels::Arena* arena : {&saved_, &scratch_, &inputs_}) arena->place();
    allocate();
  }

  // Weighted sums of the losses.
  const std::vector<double>& run(const data::Batch& batch) {
    const kernels::ArenaScope scope(inputs_);
    std::fill(losses_.begin(), losses_.end(), 0.0);
    kernels::copy_bytes(sums_.data, ctx_.device, losses_.data(), {}, sums_.bytes());
    model_.evaluate(ctx_, upload(batch, params_, starts_, ctx_.device, inputs_), saved_, sums_);
    kernels::copy_bytes(losses_.data(), {}, sums_.data, ctx_.device, sums_.bytes());
    return losses_;
  }

 private:
  void allocate() {
    sums_ = inputs_.allocate("losses", DType::f64, {static_cast<int64_t>(model_.losses().size())});
  }

  const Model& model_;
  const data::LoaderParams params_;
  Context ctx_;
  kernels::Arena saved_, scratch_, inputs_;
  Tensor sums_;
  std::vector<double> losses_;
  std::vector<int32_t> starts_;
};

}  // namespace

Perplexity measure_perplexity(const Context& ctx, const LoadedModel& loaded,
                              const data::TokenDataset& dataset, int64_t max_batches) {
  const Model& model = *loaded.model;
  data::LoaderParams params;
  params.batch = params.micro_batch = loaded.config.train.micro_batch;
  params.context = loaded.config.model.context;
  params.offsets = model.offsets();
  const data::BatchLoader loader(dataset, params);
  Evaluator evaluator(ctx, model, loader);

  std::vector<double> sums(model.losses().size()), weights(params.offsets);
  bool all_learned = true;
  for (const auto& samples : loader.some_micro_batches(max_batches)) {
    const data::Batch batch = loader.load(samples);
    const std::vector<double>& losses = evaluator.run(batch);
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += losses[i];
    for (int64_t k = 0; k < params.offsets; ++k)
      for (int64_t i = 0; i < batch.rows(); ++i) weights[k] += batch.weights[k * batch.rows() + i];
    for (int64_t i = 0; i < batch.rows(); ++i)
      all_learned = all_learned && (batch.targets[i] < 0 || batch.weights[i] == 1);
  }

  Perplexity result;
  if (weights[0] <= 0)
    throw kernels::DataError(
        "the validation split holds no text to predict: prepare with a larger "
        "--val-fraction");
  for (size_t i = 0; i < sums.size(); ++i) {
    const double weight = weights[model.losses()[i].offset];
    result.losses.push_back(weight > 0 ? sums[i] / weight : 0);
  }
  result.tokens = static_cast<int64_t>(weights[0]);
  result.loss = result.losses[0];
  result.perplexity = std::exp(result.loss);
  if (!all_learned) return result;
  // Every token of a document but its first is predicted; the dataset's bytes are those behind them.
  const double predicted = static_cast<double>(dataset.tokens() - dataset.documents());
  result.bits_per_byte = result.loss / std::log(2.0) * predicted / static_cast<double>(dataset.bytes());
  return result;
}

}  // namespace trainer

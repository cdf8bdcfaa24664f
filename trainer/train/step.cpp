#include "trainer/train/step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels/ops/cast.h"
#include "trainer/optim/settings.h"

namespace trainer {

namespace {

using kernels::OptimizerState;
using kernels::Tensor;

OptimizerState& host_state(kernels::OptimizerBuffers& buffers) {
  return *static_cast<OptimizerState*>(buffers.state.data);
}

template <typename T>
Tensor view(const std::vector<T>& values, kernels::Shape shape) {
  return Tensor(const_cast<T*>(values.data()), kernels::dtype_of<T>(), shape);
}

// Rank r of n takes items [r * count / n, (r + 1) * count / n).
std::pair<size_t, size_t> share(size_t count, const comm::Communicator& ranks) {
  return {count * ranks.rank() / ranks.size(), count * (ranks.rank() + 1) / ranks.size()};
}

}  // namespace

Rehearsal rehearse(const Model& model, const kernels::Context& ctx, int64_t rows, int64_t sequences) {
  Rehearsal r{std::make_unique<kernels::Arena>("saved", ctx.device),
              std::make_unique<kernels::Arena>("scratch", ctx.device)};
  kernels::Context dry = ctx;
  dry.scratch = r.scratch.get();
  dry.rehearsal = true;
  kernels::Arena inputs("batch", ctx.device);
  const int64_t offsets = model.offsets(), losses = static_cast<int64_t>(model.losses().size());
  using kernels::DType;
  const ModelBatch batch{inputs.allocate("tokens", DType::i32, {rows}),
                         inputs.allocate("positions", DType::i32, {rows}),
                         inputs.allocate("cu_seqlens", DType::i32, {sequences + 1}),
                         inputs.allocate("targets", DType::i32, {offsets, rows}),
                         inputs.allocate("weights", DType::f32, {offsets, rows})};
  model.forward_backward(dry, batch, inputs.allocate("seeds", DType::f32, {losses}), *r.saved,
                         inputs.allocate("losses", DType::f64, {losses}), [](int64_t) {});
  r.saved->release(0);
  model.evaluate(dry, batch, *r.saved, inputs.allocate("losses", DType::f64, {losses}));
  r.saved->release(0);
  return r;
}

Stepper::Stepper(const configs::Config& config, Model& model, const data::BatchLoader& loader,
                 comm::Communicator& ranks, const kernels::Context& ctx)
    : config_(config), model_(model), loader_(loader), ranks_(ranks), ctx_(ctx) {
  reference_rows_ = config.train.micro_batch * config.model.context;
  Rehearsal measured = rehearse(model, ctx, loader.row_buckets().back(), config.train.micro_batch + 1);
  saved_ = std::move(measured.saved);
  scratch_ = std::move(measured.scratch);
  saved_->place();
  scratch_->place();
  ctx_.scratch = scratch_.get();
  segments_ = model.parameters().segments();
  shard_segments_ = model.parameters().shard_segments();
  loss_sums_.resize(model.losses().size());
  reducer_ = std::make_unique<comm::GradientReducer>(
      ranks, model.parameters().buffers().gradients, static_cast<size_t>(config.comm.bucket_mb * (1 << 20)),
      model.parameters().sharded() ? model.parameters().shard_elements() : 0);
  set_state(initial_state(config));
}

Stepper::~Stepper() = default;

const OptimizerState& Stepper::state() const { return host_state(model_.parameters().buffers()); }

void Stepper::set_state(const OptimizerState& state) { host_state(model_.parameters().buffers()) = state; }

ModelBatch Stepper::upload(const data::Batch& batch) const {
  const int64_t n = batch.rows(), k = batch.offsets;
  return {view(batch.tokens, {n}), view(batch.positions, {n}),
          view(batch.cu_seqlens, {static_cast<int64_t>(batch.cu_seqlens.size())}),
          view(batch.targets, {k, n}), view(batch.weights, {k, n})};
}

void Stepper::backward_micro_batches(const data::StepPlan& plan, bool overlap) {
  const auto& losses = model_.losses();
  std::vector<float> factors(losses.size()), seeds(losses.size());
  for (size_t i = 0; i < losses.size(); ++i) {
    const double sum = plan.weight_sums[losses[i].offset];
    const double ratio = sum > 0 ? plan.weight_sums[0] / sum : 0.0;
    factors[i] = static_cast<float>(losses[i].weight * ratio / static_cast<double>(reference_rows_));
  }
  const kernels::Shape shape{static_cast<int64_t>(losses.size())};
  kernels::loss_seeds(ctx_, model_.parameters().buffers().state, view(factors, shape), view(seeds, shape));
  const auto [first, last] = share(plan.micro_batches.size(), ranks_);
  for (size_t m = first; m < last; ++m) {
    const data::Batch batch = loader_.load(plan.micro_batches[m]);
    const bool reduce = overlap && m + 1 == last;
    kernels::ArenaScope scope(*saved_);
    model_.forward_backward(ctx_, upload(batch), view(seeds, shape), *saved_, view(loss_sums_, shape),
                            [&](int64_t begin) {
                              if (reduce) reducer_->ready(begin);
                              reducer_->progress();
                            });
  }
}

StepMetrics Stepper::run(bool stop_requested) {
  auto& buffers = model_.parameters().buffers();
  const auto rules = loss_scale_rules(config_);
  const data::StepPlan plan = loader_.plan(state().step);
  StepMetrics metrics;
  metrics.step = state().step;
  metrics.loss_scale = state().loss_scale;
  metrics.tokens = plan.weight_sums[0];

  kernels::fill(ctx_, buffers.gradients, 0.0f);
  std::fill(loss_sums_.begin(), loss_sums_.end(), 0.0);
  // After a skipped step gradients are looked at before they are summed, so that the rank that overflows can
  // be named.
  const bool attribute = state().consecutive_skips > 0;
  backward_micro_batches(plan, !attribute);
  const std::vector<float> unscaling = {
      static_cast<float>(static_cast<double>(reference_rows_) / std::max(plan.weight_sums[0], 1.0))};
  const Tensor normaliser = view(unscaling, {1});
  int64_t culprit = 0;
  if (attribute) {
    kernels::gradient_statistics(ctx_, segments_, normaliser, buffers);
    if (state().nonfinite) culprit = ranks_.size() - ranks_.rank();
  }
  reducer_->ready(0);
  reducer_->finish();
  kernels::OptimizerBuffers shard = model_.parameters().shard();
  kernels::gradient_statistics(ctx_, shard_segments_, normaliser, shard);
  if (shard.sums) {
    ranks_.all_reduce(shard.sums, comm::Reduce::sum);
    kernels::gradient_norm(ctx_, normaliser, shard);
  }

  // The first of the tensors that the ranks found, as the distance from the end.
  const auto tensors = static_cast<int64_t>(segments_.size());
  const int64_t found = state().first_nonfinite < 0 ? 0 : tensors - state().first_nonfinite;
  std::vector<int64_t> agreed = {state().nonfinite, stop_requested ? 1 : 0, culprit, found};
  ranks_.all_reduce(view(agreed, {4}), comm::Reduce::max);
  ranks_.all_reduce(view(loss_sums_, {static_cast<int64_t>(loss_sums_.size())}), comm::Reduce::sum);
  host_state(buffers).nonfinite = static_cast<int32_t>(agreed[0]);
  host_state(buffers).first_nonfinite = agreed[3] > 0 ? static_cast<int32_t>(tensors - agreed[3]) : -1;
  metrics.stop_requested = agreed[1] != 0;
  if (agreed[2] > 0) metrics.nonfinite_rank = static_cast<int>(ranks_.size() - agreed[2]);

  kernels::update_loss_scale(ctx_, rules, buffers);
  kernels::adamw(ctx_, shard_segments_, normaliser, adamw_params(config_), shard);
  if (model_.parameters().sharded()) ranks_.all_gather(shard.weights, model_.parameters().padded_weights());

  for (size_t i = 0; i < loss_sums_.size(); ++i)
    metrics.losses.push_back(loss_sums_[i] / std::max(plan.weight_sums[model_.losses()[i].offset], 1.0));
  metrics.learning_rate = state().learning_rate;
  metrics.gradient_norm = state().gradient_norm;
  metrics.skipped = state().skip != 0;
  metrics.skipped_total = state().skipped;
  metrics.consecutive_skips = state().consecutive_skips;
  if (metrics.skipped && state().first_nonfinite >= 0)
    metrics.nonfinite_tensor = model_.parameters().parameters()[state().first_nonfinite].name;
  return metrics;
}

std::vector<double> Stepper::validate(const data::BatchLoader& loader,
                                      std::span<const std::vector<int64_t>> micro_batches) {
  const size_t count = model_.losses().size();
  std::vector<double> sums(2 * count, 0.0);  // losses, then weights
  const auto [first, last] = share(micro_batches.size(), ranks_);
  for (size_t m = first; m < last; ++m) {
    const data::Batch batch = loader.load(micro_batches[m]);
    kernels::ArenaScope scope(*saved_);
    model_.evaluate(ctx_, upload(batch), *saved_,
                    Tensor(sums.data(), kernels::DType::f64, {static_cast<int64_t>(count)}));
    for (size_t i = 0; i < count; ++i) {
      const float* w = batch.weights.data() + model_.losses()[i].offset * batch.rows();
      sums[count + i] += std::accumulate(w, w + batch.rows(), 0.0);
    }
  }
  ranks_.all_reduce(view(sums, {static_cast<int64_t>(sums.size())}), comm::Reduce::sum);
  std::vector<double> means(count);
  for (size_t i = 0; i < count; ++i) means[i] = sums[i] / std::max(sums[count + i], 1.0);
  return means;
}

}  // namespace trainer

#include "trainer/train/step.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <numeric>

#include "kernels/ops/cast.h"
#include "kernels/ops/linear.h"
#include "trainer/optim/settings.h"

namespace trainer {

namespace {

using kernels::DType;
using kernels::OptimizerState;
using kernels::Tensor;

constexpr int64_t kStateBytes = sizeof(OptimizerState);

// Rank r of n takes items [r * count / n, (r + 1) * count / n).
std::pair<size_t, size_t> share(size_t count, const comm::Communicator& ranks) {
  return {count * ranks.rank() / ranks.size(), count * (ranks.rank() + 1) / ranks.size()};
}

// One whole number of the state, on the device.
Tensor field(const Tensor& state, size_t offset) {
  return Tensor(static_cast<char*>(state.data) + offset, DType::i32, {1}, state.device);
}

size_t numbers_bytes(int64_t losses, int ranks) {
  BlockCutter measure(nullptr);
  cut_numbers(measure, losses, ranks);
  return measure.bytes();
}

// The tensors of the step's own arena, the same in every pass.
struct StepTensors {
  Tensor batch, block, seeds, validation;
};
StepTensors take(kernels::Arena& arena, const Model& model, const data::LoaderParams& params, int ranks) {
  const auto losses = static_cast<int64_t>(model.losses().size());
  const auto bytes = [](size_t n) { return kernels::Shape{static_cast<int64_t>(n)}; };
  size_t batch = 0;
  for (const BatchShape& shape : batch_shapes(params)) batch = std::max(batch, batch_bytes(shape, params));
  return {arena.allocate("batch", DType::u8, bytes(batch)),
          arena.allocate("numbers", DType::u8, bytes(numbers_bytes(losses, ranks))),
          arena.allocate("seeds", DType::f32, {losses}), arena.allocate("validation", DType::f64, {losses})};
}

// A GPU's exchange takes multiprocessors from the products beside it: few large ones are over sooner.
size_t bucket_bytes(const configs::Config& config, kernels::Device device) {
  double mib = config.comm.bucket_mb;
  if (mib == 0) mib = device.is_cuda() ? 64 : 4;
  return static_cast<size_t>(mib * (1 << 20));
}

// Own elements of a shard whose updated weights are gathered while the next ones are computed.
int64_t part_elements(const ParameterStore& store, size_t bytes) {
  const auto stripe_bytes =
      static_cast<size_t>(store.sharding().stripe()) * kernels::size_of(store.compute());
  const size_t stripes = std::max<size_t>(1, bytes / stripe_bytes);
  return static_cast<int64_t>(stripes) * store.sharding().piece;
}

ModelBatch view_batch(const Tensor& block, const BatchShape& shape, const data::LoaderParams& params,
                      const configs::Config& config) {
  BlockCutter cutter(block.data, block.device);
  ModelBatch batch = cut_batch(cutter, shape, params);
  batch.hints.deterministic = config.train.deterministic;
  return batch;
}

}  // namespace

StepRehearsal rehearse_step(const Model& model, const kernels::Context& ctx, const data::LoaderParams& params,
                            int ranks) {
  StepRehearsal rehearsal{std::make_unique<kernels::Arena>("saved", ctx.device),
                          std::make_unique<kernels::Arena>("scratch", ctx.device),
                          std::make_unique<kernels::Arena>("step", ctx.device),
                          {}};
  kernels::Context dry = ctx;
  dry.scratch = rehearsal.scratch.get();
  dry.rehearsal = true;
  const StepTensors step = take(*rehearsal.step, model, params, ranks);
  for (const BatchShape& shape : batch_shapes(params)) {
    const ModelBatch batch = view_batch(step.batch, shape, params, model.config());
    rehearsal.gradients.clear();
    model.forward_backward(dry, batch, step.seeds, *rehearsal.saved, step.validation,
                           [&](int64_t begin, int64_t end) { rehearsal.gradients.emplace_back(begin, end); });
    model.evaluate(dry, batch, *rehearsal.saved, step.validation);
  }
  const ParameterStore& store = model.parameters();
  kernels::OptimizerBuffers whole = store.buffers(), shard = store.shard();
  const Tensor normaliser = step.seeds.slice(0, 1);  // as good as any
  kernels::gradient_statistics(dry, store.segments(), normaliser, whole);
  kernels::gradient_statistics(dry, store.shard_segments(), normaliser, shard);
  kernels::adamw(dry, store.shard_segments(), normaliser, {}, shard);
  return rehearsal;
}

Stepper::Stepper(const configs::Config& config, Model& model, const data::BatchLoader& loader,
                 comm::Communicator& ranks, const kernels::Context& ctx, std::optional<size_t> late)
    : config_(config),
      model_(model),
      loader_(loader),
      ranks_(ranks),
      ctx_(ctx),
      rehearsal_(rehearse_step(model, ctx, loader.params(), ranks.size())),
      late_(late.value_or(ctx.device.is_cuda() ? 1 : 0)),
      graphs_(ctx.device.is_cuda() && config.train.graph),
      reference_rows_(config.train.micro_batch * config.model.context) {
  // Which kernel is the fastest differs from process to process, and with it the last bits.
  kernels::measure_products(!config.train.deterministic);
  for (auto* arena : {rehearsal_.saved.get(), rehearsal_.scratch.get(), rehearsal_.step.get()})
    arena->place();
  ctx_.scratch = rehearsal_.scratch.get();
  const StepTensors tensors = take(*rehearsal_.step, model, loader.params(), ranks.size());
  batch_ = tensors.batch;
  block_ = tensors.block;
  seeds_ = tensors.seeds;
  validation_ = tensors.validation;
  BlockCutter cutter(block_.data, block_.device);
  numbers_ = cut_numbers(cutter, static_cast<int64_t>(model.losses().size()), ranks.size());
  uploads_ =
      std::make_unique<Uploads>(ctx.device, std::max({batch_.bytes(), block_.bytes(), validation_.bytes()}));
  for (size_t i = 0; i <= late_; ++i)
    flights_.push_back(std::make_unique<Flight>(ctx.device, kStateBytes + block_.bytes()));
  const ParameterStore& store = model.parameters();
  segments_ = store.segments();
  shard_segments_ = store.shard_segments();
  const comm::Buckets buckets{.bytes = bucket_bytes(config, ctx.device),
                              .stripe = store.sharding().stripe(),
                              .joined = ctx.device.is_cuda()};
  reducer_ =
      std::make_unique<comm::GradientReducer>(ranks, store.padded_gradients(), rehearsal_.gradients, buckets);
  if (store.sharded() && ctx.device.is_cuda()) update_elements_ = part_elements(store, buckets.bytes);
  set_state(initial_state(config));
}

Stepper::~Stepper() = default;

bool Stepper::captured() const {
  return std::any_of(recorded_.begin(), recorded_.end(),
                     [](const auto& entry) { return entry.second.graph.ready(); });
}

void Stepper::set_state(const OptimizerState& state) {
  const Tensor& there = model_.parameters().buffers().state;
  kernels::copy_bytes(there.data, there.device, &state, {}, sizeof(state));
  read_state();
}

void Stepper::read_state() {
  const Tensor& there = model_.parameters().buffers().state;
  kernels::copy_bytes(&state_, {}, there.data, there.device, sizeof(state_));
  attempts_ = state_.step;
}

void Stepper::upload_numbers(const data::StepPlan& plan, bool stop_requested) {
  const auto& losses = model_.losses();
  uploads_->send(ctx_.stream, block_.data, block_.bytes(), [&](void* slot) {
    BlockCutter cutter(slot);
    const StepNumbers numbers = cut_numbers(cutter, static_cast<int64_t>(losses.size()), ranks_.size());
    for (size_t i = 0; i < losses.size(); ++i) {
      const double sum = plan.weight_sums[losses[i].offset];
      const double ratio = sum > 0 ? plan.weight_sums[0] / sum : 0.0;
      numbers.factors.as<float>()[i] =
          static_cast<float>(losses[i].weight * ratio / static_cast<double>(reference_rows_));
      numbers.loss_sums.as<double>()[i] = 0;
    }
    *numbers.normaliser.as<float>() =
        static_cast<float>(static_cast<double>(reference_rows_) / std::max(plan.weight_sums[0], 1.0));
    int32_t* agreed = numbers.agreed.as<int32_t>();
    std::fill_n(agreed, numbers.agreed.numel(), 0);
    agreed[0] = stop_requested ? 1 : 0;
    std::fill_n(agreed + 1, ranks_.size(), -1);
  });
}

BatchShape Stepper::upload(const data::Batch& batch) {
  const BatchShape shape = shape_of(batch, loader_.params());
  uploads_->send(ctx_.stream, batch_.data, batch_bytes(shape, loader_.params()),
                 [&](void* slot) { pack_batch(batch, shape, loader_.params(), slot); });
  return shape;
}

void Stepper::enqueue(const Work& work) {
  if (!graphs_) return compute(work);
  Recorded& recorded = recorded_[work];
  if (!recorded.warm) {
    recorded.warm = true;
    return compute(work);
  }
  if (!recorded.graph.ready()) capture(work, recorded.graph);
  recorded.graph.launch(ctx_.stream);
}

void Stepper::capture(const Work& work, kernels::Graph& graph) {
  kernels::Graph::begin(ctx_.stream);
  try {
    compute(work);
  } catch (...) {
    // Ends the recording, so that the stream can be used again; what went wrong first is what counts.
    try {
      graph.end(ctx_.stream);
    } catch (const kernels::DeviceError&) {
    }
    throw;
  }
  graph.end(ctx_.stream);
}

void Stepper::compute(const Work& work) {
  auto& buffers = model_.parameters().buffers();
  const bool computes = work.shape.rows > 0;
  if (work.first) {
    if (computes)
      model_.parameters().begin_gradients(ctx_);
    else
      kernels::fill(ctx_, buffers.gradients, 0.0f);
    kernels::loss_seeds(ctx_, buffers.state, numbers_.factors, seeds_);
  }
  if (computes) backward(work.shape, work.last && !work.attribute);
  if (work.last) finish_step(work.attribute);
}

void Stepper::backward(const BatchShape& shape, bool reduce) {
  kernels::ArenaScope scope(*rehearsal_.saved);
  const ModelBatch batch = view_batch(batch_, shape, loader_.params(), config_);
  model_.forward_backward(ctx_, batch, seeds_, *rehearsal_.saved, numbers_.loss_sums,
                          [&](int64_t begin, int64_t end) {
                            if (reduce) reducer_->ready({begin, end});
                            reducer_->progress();
                          });
  model_.parameters().check_written();
}

void Stepper::finish_step(bool attribute) {
  auto& buffers = model_.parameters().buffers();
  const int rank = ranks_.rank(), size = ranks_.size();
  const auto report = [&](int64_t place, size_t offset) {
    kernels::copy_async(numbers_.agreed.slice(place, 1).data, field(buffers.state, offset).data,
                        sizeof(int32_t), ctx_.device, ctx_.stream);
  };
  if (attribute) {
    kernels::gradient_statistics(ctx_, segments_, numbers_.normaliser, buffers);
    report(1 + size + rank, offsetof(OptimizerState, nonfinite));
  }
  reducer_->finish();
  const ParameterStore& store = model_.parameters();
  kernels::OptimizerBuffers shard = store.shard();
  kernels::gradient_statistics(ctx_, shard_segments_, numbers_.normaliser, shard);
  if (shard.sums) {
    ranks_.all_reduce(shard.sums, comm::Reduce::sum);
    kernels::gradient_norm(ctx_, numbers_.normaliser, shard);
  }
  report(1 + rank, offsetof(OptimizerState, first_nonfinite));
  // For the host alone: norm and non-finite count come of equal bits on every rank.
  const auto agreed = ranks_.all_reduce_async(numbers_.agreed, comm::Reduce::max);
  const auto losses = ranks_.all_reduce_async(numbers_.loss_sums, comm::Reduce::sum);
  kernels::update_loss_scale(ctx_, loss_scale_rules(config_), buffers);
  update(shard);
  agreed->wait();
  losses->wait();
}

void Stepper::update(kernels::OptimizerBuffers& shard) {
  const ParameterStore& store = model_.parameters();
  std::vector<std::unique_ptr<comm::Request>> gathers;
  kernels::UpdateParts parts{.elements = update_elements_};
  if (store.sharded())
    parts.updated = [&](int64_t begin, int64_t end) {
      gathers.push_back(ranks_.all_gather_async(store.weight_stripes(begin, end)));
    };
  kernels::adamw(ctx_, shard_segments_, numbers_.normaliser, adamw_params(config_), shard, parts);
  for (auto& gather : gathers) gather->wait();
}

void Stepper::send_results(const data::StepPlan& plan, bool attribute) {
  Flight& flight = *flights_[static_cast<size_t>(attempts_) % flights_.size()];
  flight.step = attempts_;
  flight.weight_sums = plan.weight_sums;
  flight.attribute = attribute;
  char* memory = static_cast<char*>(flight.memory.data());
  kernels::copy_async(memory, model_.parameters().buffers().state.data, kStateBytes, ctx_.device,
                      ctx_.stream);
  kernels::copy_async(memory + kStateBytes, block_.data, block_.bytes(), ctx_.device, ctx_.stream);
  flight.landed.record(ctx_.stream);
  in_flight_.push_back(&flight);
}

std::optional<StepMetrics> Stepper::run(bool stop_requested) {
  const data::StepPlan plan = loader_.plan(attempts_);
  upload_numbers(plan, stop_requested);
  // After a skipped step gradients are looked at before they are summed, so that the rank that overflows can
  // be named.
  const bool attribute = state_.consecutive_skips > 0;
  const auto [first, last] = share(plan.micro_batches.size(), ranks_);
  if (first == last) enqueue({BatchShape{}, true, true, attribute});
  for (size_t m = first; m < last; ++m) {
    const BatchShape shape = upload(loader_.load(plan.micro_batches[m]));
    enqueue({shape, m == first, m + 1 == last, attribute && m + 1 == last});
  }
  send_results(plan, attribute);
  ranks_.watch();
  ++attempts_;
  if (in_flight_.size() <= late_) return {};
  return collect();
}

std::optional<StepMetrics> Stepper::flush() {
  if (in_flight_.empty()) return {};
  return collect();
}

StepMetrics Stepper::collect() {
  Flight& flight = *in_flight_.front();
  in_flight_.pop_front();
  wait_for(flight.landed, [&] { reducer_->progress(); });
  ranks_.poll();  // an exchange that was given up ends, too, and leaves anything in what landed
  char* memory = static_cast<char*>(flight.memory.data());
  std::memcpy(&state_, memory, sizeof(state_));
  BlockCutter cutter(memory + kStateBytes);
  const auto& losses = model_.losses();
  const StepNumbers numbers = cut_numbers(cutter, static_cast<int64_t>(losses.size()), ranks_.size());

  StepMetrics metrics;
  metrics.step = flight.step;
  metrics.tokens = flight.weight_sums[0];
  for (size_t i = 0; i < losses.size(); ++i)
    metrics.losses.push_back(numbers.loss_sums.as<double>()[i] /
                             std::max(flight.weight_sums[losses[i].offset], 1.0));
  metrics.loss_scale = state_.gradient_scale;
  metrics.learning_rate = state_.learning_rate;
  metrics.gradient_norm = state_.gradient_norm;
  metrics.skipped = state_.skip != 0;
  metrics.consecutive_skips = state_.consecutive_skips;
  const std::span agreed(numbers.agreed.as<int32_t>(), static_cast<size_t>(numbers.agreed.numel()));
  metrics.stop_requested = agreed[0] != 0;
  const size_t size = static_cast<size_t>(ranks_.size());
  int32_t tensor = -1;
  for (const int32_t found : agreed.subspan(1, size))
    if (found >= 0) tensor = tensor < 0 ? found : std::min(tensor, found);
  if (metrics.skipped && tensor >= 0)
    metrics.nonfinite_tensor = model_.parameters().parameters()[static_cast<size_t>(tensor)].name;
  const auto before = agreed.subspan(1 + size, size);
  const auto culprit = std::find_if(before.begin(), before.end(), [](int32_t n) { return n > 0; });
  if (flight.attribute && culprit != before.end())
    metrics.nonfinite_rank = static_cast<int>(culprit - before.begin());
  return metrics;
}

std::vector<double> Stepper::validate(const data::BatchLoader& loader,
                                      std::span<const std::vector<int64_t>> micro_batches) {
  const size_t count = model_.losses().size();
  std::vector<double> sums(2 * count, 0.0);  // losses, then weights
  uploads_->send(ctx_.stream, validation_.data, validation_.bytes(),
                 [&](void* slot) { std::memset(slot, 0, validation_.bytes()); });
  const auto [first, last] = share(micro_batches.size(), ranks_);
  for (size_t m = first; m < last; ++m) {
    const data::Batch batch = loader.load(micro_batches[m]);
    const BatchShape shape = upload(batch);
    kernels::ArenaScope scope(*rehearsal_.saved);
    model_.evaluate(ctx_, view_batch(batch_, shape, loader_.params(), config_), *rehearsal_.saved,
                    validation_);
    for (size_t i = 0; i < count; ++i) {
      const float* w = batch.weights.data() + model_.losses()[i].offset * batch.rows();
      sums[count + i] += std::accumulate(w, w + batch.rows(), 0.0);
    }
  }
  kernels::copy_bytes(sums.data(), {}, validation_.data, validation_.device, validation_.bytes());
  ranks_.all_reduce(Tensor(sums.data(), DType::f64, {static_cast<int64_t>(sums.size())}), comm::Reduce::sum);
  std::vector<double> means(count);
  for (size_t i = 0; i < count; ++i) means[i] = sums[i] / std::max(sums[count + i], 1.0);
  return means;
}

}  // namespace trainer

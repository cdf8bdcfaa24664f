// The optimizer on a GPU against the one on the CPU: the same states, step after step, and the same weights.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>

#include "kernels/core/stream.h"
#include "kernels/ops/cast.h"
#include "kernels/ops/optimizer.h"
#include "tests/support/optimizer_shard.h"
#include "tests/support/rehearsed.h"
#include "tests/support/tensor_buffer.h"

namespace {

using kernels::Context;
using kernels::Device;
using kernels::DType;
using kernels::Hysteresis;
using kernels::LossScaleRules;
using kernels::OptimizerState;
using kernels::Segment;
using support::TensorBuffer;

constexpr Device kGpu{Device::Kind::cuda, 0};
constexpr int64_t kCount = 20011;

// A matrix, a gap, a frozen part, and vectors that begin and end anywhere.
std::vector<Segment> some_segments() {
  std::vector<Segment> segments = {{.begin = 0, .count = 7000, .decay = true},
                                   {.begin = 7008, .count = 3001, .decay = true, .trainable = false}};
  for (int64_t begin = 10010; begin + 29 <= kCount; begin += 29)
    segments.push_back({.begin = begin, .count = 28, .decay = begin % 2 == 0});
  return segments;
}

// One model on one device, with the working memory of its steps.
struct Model {
  Device device;
  TensorBuffer weights, master, gradients, m, v, state, normaliser, factors, seeds;
  kernels::OptimizerBuffers buffers;
  kernels::Arena scratch;
  Context ctx;

  Model(Device device, kernels::Stream stream, const std::vector<Segment>& segments)
      : device(device),
        weights(DType::f16, {kCount}, device),
        master(DType::f32, {kCount}, device),
        gradients(DType::f32, {kCount}, device),
        m(DType::f32, {kCount}, device),
        v(DType::f32, {kCount}, device),
        state(DType::u8, {sizeof(OptimizerState)}, device),
        normaliser(DType::f32, {1}, device),
        factors(DType::f32, {2}, device),
        seeds(DType::f32, {2}, device),
        buffers{weights, master, gradients, m, v, state},
        scratch("scratch", device),
        ctx{.device = device, .stream = stream, .scratch = &scratch, .rehearsal = true} {
    master.fill_normal(1);
    weights.fill_normal(1);
    m.fill_normal(3, 0.01);
    v.set(std::vector<double>(kCount, 0.002));
    gradients.fill_normal(2);
    normaliser.set(0, 0.5);
    factors.set(std::vector<double>{0.5, 0.125});
    put({.loss_scale = 1024.0f});
    step(segments, {});
    scratch.place();
    ctx.rehearsal = false;
  }
  void put(const OptimizerState& value) {
    kernels::copy_bytes(state.tensor().data, device, &value, {}, sizeof(value));
  }
  OptimizerState now() const {
    OptimizerState value;
    kernels::copy_bytes(&value, {}, state.tensor().data, device, sizeof(value));
    return value;
  }
  void step(const std::vector<Segment>& segments, const LossScaleRules& rules) {
    const kernels::AdamWParams params{.schedule = {.lr = 0.01f, .warmup = 4, .total = 20}, .clip = 0.7f};
    kernels::loss_seeds(ctx, state, factors, seeds);
    kernels::gradient_statistics(ctx, segments, normaliser, buffers);
    kernels::update_loss_scale(ctx, rules, buffers);
    kernels::adamw(ctx, segments, normaliser, params, buffers);
  }
};

class CudaOptimizer : public testing::Test {
 protected:
  void SetUp() override {
    if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU";
    stream_.emplace(kGpu);
  }
  std::optional<kernels::OwnedStream> stream_;
};

void expect_equal(const OptimizerState& gpu, const OptimizerState& cpu) {
  EXPECT_EQ(gpu.step, cpu.step);
  EXPECT_EQ(gpu.updates, cpu.updates);
  EXPECT_EQ(gpu.loss_scale, cpu.loss_scale);
  EXPECT_EQ(gpu.clean_steps, cpu.clean_steps);
  EXPECT_EQ(gpu.hysteresis_left, cpu.hysteresis_left);
  EXPECT_EQ(gpu.consecutive_skips, cpu.consecutive_skips);
  EXPECT_EQ(gpu.skipped, cpu.skipped);
  EXPECT_EQ(gpu.nonfinite, cpu.nonfinite);
  EXPECT_EQ(gpu.first_nonfinite, cpu.first_nonfinite);
  EXPECT_EQ(gpu.skip, cpu.skip);
  EXPECT_EQ(gpu.gradient_scale, cpu.gradient_scale);
  // fp64 sums in another order, rounded once.
  if (std::isfinite(cpu.gradient_norm)) {
    EXPECT_NEAR(gpu.gradient_norm, cpu.gradient_norm, 0x1p-23 * cpu.gradient_norm);
  } else {
    EXPECT_EQ(gpu.gradient_norm, cpu.gradient_norm);
  }
  // The cosines of two libraries differ by an ulp of fp64: fp32 rounds the same way or to a neighbour.
  EXPECT_NEAR(gpu.learning_rate, cpu.learning_rate, 0x1p-23 * cpu.learning_rate);
}

// Ten updates of relative error a few 2^-24 each, as the CPU's own test against fp64 allows.
void expect_equal_memory(const Model& gpu, const Model& cpu) {
  const auto a = gpu.master.values(), b = cpu.master.values();
  for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 80 * 0x1p-24) << i;
  const auto w = gpu.weights.values();
  for (const Segment& s : some_segments())
    for (int64_t i = s.begin; s.trainable && i < s.begin + s.count; ++i)
      ASSERT_EQ(w[static_cast<size_t>(i)],
                static_cast<float>(kernels::f16(static_cast<float>(a[static_cast<size_t>(i)]))))
          << i;
}

void expect_same_sequence(const LossScaleRules& rules, kernels::Stream stream) {
  const auto segments = some_segments();
  Model gpu(kGpu, stream, segments), cpu({}, {}, segments);
  const int script[] = {0, 0, 1, 0, 2, 2, 0, 0, 0, 0, 1, 0, 0};  // how many elements overflow
  for (size_t t = 0; t < std::size(script); ++t) {
    SCOPED_TRACE(t);
    for (Model* model : {&gpu, &cpu}) {
      model->gradients.fill_normal(100 + t, 300);
      if (script[t] > 0) model->gradients.set(9000, std::numeric_limits<double>::infinity());  // frozen
      if (script[t] > 0) model->gradients.set(kCount - 40, std::nan(""));
      if (script[t] > 1) model->gradients.set(6999, -std::numeric_limits<double>::infinity());
      model->step(segments, rules);
    }
    kernels::synchronize(kGpu, stream);
    expect_equal(gpu.now(), cpu.now());
    EXPECT_EQ(gpu.seeds.values(), cpu.seeds.values());
    expect_equal_memory(gpu, cpu);
  }
  EXPECT_EQ(gpu.now().skipped, 4);
}

TEST_F(CudaOptimizer, StatesEqualTheCpusThroughOverflows) {
  for (const auto hysteresis : {Hysteresis::none, Hysteresis::until_growth, Hysteresis::consecutive}) {
    SCOPED_TRACE(static_cast<int>(hysteresis));
    expect_same_sequence({.growth_interval = 3, .hysteresis = hysteresis}, stream_->get());
  }
  expect_same_sequence({.dynamic = false}, stream_->get());
}

// A recorded step reads what changes from the device: launched again and again it is as many eager steps.
TEST_F(CudaOptimizer, ARecordedStepIsManySteps) {
  const auto segments = some_segments();
  Model eager(kGpu, stream_->get(), segments), recorded(kGpu, stream_->get(), segments);
  kernels::Graph graph;
  kernels::Graph::begin(stream_->get());
  recorded.step(segments, {.growth_interval = 2});
  graph.end(stream_->get());
  for (int t = 0; t < 6; ++t) {
    for (Model* model : {&eager, &recorded}) {
      model->gradients.fill_normal(100 + t, 300);
      model->normaliser.set(0, 0.5 + t);
      if (t == 3) model->gradients.set(17, std::nan(""));
    }
    eager.step(segments, {.growth_interval = 2});
    graph.launch(stream_->get());
    kernels::synchronize(kGpu, stream_->get());
  }
  EXPECT_EQ(eager.now().updates, 5);
  EXPECT_EQ(recorded.state.bytes(), eager.state.bytes());
  for (const auto& [a, b] : {std::pair{&eager.weights, &recorded.weights},
                             {&eager.master, &recorded.master},
                             {&eager.m, &recorded.m},
                             {&eager.v, &recorded.v}})
    EXPECT_TRUE(a->bytes() == b->bytes());
}

// Shards on a GPU: their sums add up to the whole's, what is not finite in one stops all, and they move as
// the whole does on the CPU.
TEST_F(CudaOptimizer, ShardsMoveLikeTheWhole) {
  const auto segments = some_segments();
  const kernels::AdamWParams params{.schedule = {.lr = 0.01f, .warmup = 4, .total = 20}, .clip = 0.7f};
  for (const int ranks : {2, 3})
    for (const bool finite : {true, false}) {
      Model before({}, {}, segments), whole({}, {}, segments), model(kGpu, stream_->get(), segments);
      for (Model* m : {&before, &whole}) {
        m->gradients.fill_normal(5, 300);
        if (!finite) m->gradients.set(17, std::nan(""));
      }
      // Statistics of one step, before the scale may change.
      const OptimizerState start{.loss_scale = 1024.0f, .gradient_scale = 1024.0f};
      whole.put(start);
      std::vector<double> total(kernels::kOptimizerPieces, 0.0);
      std::vector<std::unique_ptr<support::OptimizerShard>> shards;
      for (int r = 0; r < ranks; ++r) {
        auto& shard = *shards.emplace_back(
            std::make_unique<support::OptimizerShard>(before.buffers, model.state.tensor(), r, ranks));
        model.put(start);
        kernels::gradient_statistics(model.ctx, shard.own(segments), model.normaliser, shard.buffers);
        kernels::synchronize(kGpu, stream_->get());
        EXPECT_EQ(model.now().nonfinite, !finite && shard.has(17));
        const auto sums = shard.sums.values();
        for (size_t i = 0; i < total.size(); ++i) total[i] += sums[i];
      }
      kernels::gradient_statistics(whole.ctx, segments, whole.normaliser, whole.buffers);
      kernels::update_loss_scale(whole.ctx, {}, whole.buffers);
      kernels::adamw(whole.ctx, segments, whole.normaliser, params, whole.buffers);
      std::vector<double> master = before.master.values();
      for (const auto& shard : shards) {
        model.put(start);
        shard->sums.set(total);
        int updates = 0;
        kernels::gradient_norm(model.ctx, model.normaliser, shard->buffers);
        kernels::update_loss_scale(model.ctx, {}, shard->buffers);
        kernels::adamw(model.ctx, shard->own(segments), model.normaliser, params, shard->buffers,
                       {.elements = 5 * shard->shard.piece, .updated = [&](int64_t, int64_t) { ++updates; }});
        kernels::synchronize(kGpu, stream_->get());
        EXPECT_GT(updates, 10);
        const OptimizerState now = model.now();
        EXPECT_EQ(now.skip, !finite);
        EXPECT_EQ(now.updates, whole.now().updates);
        const double norm = whole.now().gradient_norm;
        if (finite) {
          EXPECT_NEAR(now.gradient_norm, norm, 0x1p-23 * norm);
        }
        shard->give(shard->master, master);
        const std::vector<double> weights = shard->weights.values();
        for (const Segment& s : segments)
          for (int64_t i = s.begin; finite && s.trainable && i < s.begin + s.count; ++i)
            if (shard->has(i)) {
              const auto at = static_cast<size_t>(i);
              ASSERT_EQ(weights[at], static_cast<float>(kernels::f16(static_cast<float>(master[at])))) << i;
            }
      }
      const std::vector<double> right = whole.master.values();
      // As expect_equal_memory allows for ten updates.
      for (size_t i = 0; i < right.size(); ++i) ASSERT_NEAR(master[i], right[i], 80 * 0x1p-24) << i;
    }
}

// Long segments, whose inner parts are read many elements at a time, with short ones and gaps between them.
TEST_F(CudaOptimizer, StatisticsOfLongSegmentsEqualTheCpus) {
  constexpr int64_t kLong = 300007;
  const std::vector<Segment> segments = {{.begin = 0, .count = 100000},
                                         {.begin = 100000, .count = 40001, .trainable = false},
                                         {.begin = 140001, .count = 7},
                                         {.begin = 140011, .count = 159000}};
  struct Fault {
    int64_t at;
    double value;
  };
  const std::vector<Fault> faults = {{120000, std::nan("")},
                                     {290000, std::nan("")},
                                     {150001, std::numeric_limits<double>::infinity()},
                                     {150002, -std::numeric_limits<double>::infinity()},
                                     {50000, std::numeric_limits<double>::infinity()},
                                     {299500, std::nan("")}};
  for (size_t count = 0; count <= faults.size(); ++count) {
    OptimizerState states[2];
    for (const Device device : {kGpu, Device{}}) {
      TensorBuffer gradients(DType::f32, {kLong}, device), state(DType::u8, {sizeof(OptimizerState)}, device),
          normaliser(DType::f32, {1}, device);
      gradients.fill_normal(7, 1e20);  // squares beyond fp32
      normaliser.set(0, 1e-20);
      for (size_t i = 0; i < count; ++i) gradients.set(static_cast<size_t>(faults[i].at), faults[i].value);
      const OptimizerState start{.loss_scale = 8.0f};
      kernels::copy_bytes(state.tensor().data, device, &start, {}, sizeof(start));
      kernels::OptimizerBuffers buffers{{}, {}, gradients, {}, {}, state};
      support::run_rehearsed(
          device, device.is_cuda() ? stream_->get() : kernels::Stream{},
          [&](const Context& ctx) { kernels::gradient_statistics(ctx, segments, normaliser, buffers); });
      kernels::copy_bytes(&states[device.is_cuda() ? 0 : 1], {}, state.tensor().data, device, sizeof(start));
    }
    SCOPED_TRACE(count);
    expect_equal(states[0], states[1]);
    EXPECT_EQ(states[0].nonfinite, std::vector<int>({0, 0, 1, 2, 3, 4, 4})[count]);
    EXPECT_EQ(states[0].first_nonfinite, std::vector<int>({-1, -1, 3, 3, 3, 0, 0})[count]);
  }
}

}  // namespace

#include "kernels/ops/optimizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "kernels/core/parallel.h"
#include "kernels/ops/cast.h"
#include "tests/support/optimizer_shard.h"
#include "tests/support/tensor_buffer.h"

namespace {

using kernels::AdamWParams;
using kernels::DType;
using kernels::Hysteresis;
using kernels::LossScaleRules;
using kernels::OptimizerState;
using kernels::Schedule;
using kernels::ScheduleKind;
using kernels::Segment;
using support::OptimizerShard;
using support::TensorBuffer;

// A normaliser.
TensorBuffer one(double value) {
  TensorBuffer buffer(DType::f32, {1});
  buffer.set(0, value);
  return buffer;
}

// Buffers of one model with normal values, and its state.
struct Model {
  TensorBuffer weights, master, gradients, m, v, state;
  kernels::OptimizerBuffers buffers;

  explicit Model(int64_t count, DType compute = DType::f16, OptimizerState start = {})
      : weights(compute, {count}),
        master(kernels::main_dtype(compute), {count}),
        gradients(kernels::main_dtype(compute), {count}),
        m(kernels::main_dtype(compute), {count}),
        v(kernels::main_dtype(compute), {count}),
        state(DType::u8, {sizeof(OptimizerState)}),
        buffers{weights, master, gradients, m, v, state} {
    std::memcpy(state.tensor().data, &start, sizeof(start));
    master.fill_normal(1);
    kernels::cast({}, master, weights);
    gradients.fill_normal(2, 100);
    m.fill_normal(3, 0.01);
    v.set(std::vector<double>(static_cast<size_t>(count), 0.002));
  }
  OptimizerState& now() { return *static_cast<OptimizerState*>(state.tensor().data); }
  // Everything a step may move, except the state.
  std::vector<char> memory() const {
    std::vector<char> all;
    for (const auto* b : {&weights, &master, &m, &v}) {
      const auto bytes = b->bytes();
      all.insert(all.end(), bytes.begin(), bytes.end());
    }
    return all;
  }
  void step(const std::vector<Segment>& segments, const LossScaleRules& rules = {},
            const AdamWParams& params = {}, double factor = 1) {
    const TensorBuffer normaliser = one(factor);
    kernels::gradient_statistics({}, segments, normaliser, buffers);
    kernels::update_loss_scale({}, rules, buffers);
    kernels::adamw({}, segments, normaliser, params, buffers);
  }
};

struct Transition {
  bool overflow;
  float scale;
  int clean_steps, hysteresis_left, consecutive_skips;
};

// Drives the state machine with a script and compares it after every step.
void expect_transitions(const LossScaleRules& rules, OptimizerState start,
                        const std::vector<Transition>& script) {
  Model model(8, DType::f16, start);
  int64_t skipped = 0;
  for (size_t i = 0; i < script.size(); ++i) {
    SCOPED_TRACE(i);
    OptimizerState& state = model.now();
    state.nonfinite = script[i].overflow ? 3 : 0;
    kernels::update_loss_scale({}, rules, model.buffers);
    skipped += script[i].overflow;
    EXPECT_EQ(state.skip, script[i].overflow);
    EXPECT_EQ(state.loss_scale, script[i].scale);
    EXPECT_EQ(state.clean_steps, script[i].clean_steps);
    EXPECT_EQ(state.hysteresis_left, script[i].hysteresis_left);
    EXPECT_EQ(state.consecutive_skips, script[i].consecutive_skips);
    EXPECT_EQ(state.skipped, skipped);
    EXPECT_EQ(state.step, 0);
    EXPECT_EQ(state.updates, 0);
  }
}

TEST(LossScale, WithoutHysteresisEveryOverflowBacksOff) {
  expect_transitions({.growth_interval = 3}, {.loss_scale = 64},
                     {{false, 64, 1, 2, 0},
                      {false, 64, 2, 2, 0},
                      {true, 32, 0, 2, 1},
                      {true, 16, 0, 2, 2},
                      {false, 16, 1, 2, 0},
                      {false, 16, 2, 2, 0},
                      {false, 32, 0, 2, 0},
                      {false, 32, 1, 2, 0}});
}

TEST(LossScale, UntilGrowthCountsOverflowsAcrossCleanSteps) {
  const LossScaleRules rules{
      .growth_interval = 2, .hysteresis = Hysteresis::until_growth, .hysteresis_steps = 2};
  expect_transitions(rules, {.loss_scale = 64},
                     {{true, 64, 0, 1, 1},   // tolerated
                      {false, 64, 1, 1, 0},  // a clean step does not refill
                      {true, 32, 0, 0, 1},   // the second one backs off
                      {true, 16, 0, 0, 2},   // and so does every further one
                      {false, 16, 1, 0, 0},
                      {false, 32, 0, 2, 0},  // growth refills
                      {true, 32, 0, 1, 1}});
}

TEST(LossScale, ConsecutiveIsRefilledByACleanStep) {
  const LossScaleRules rules{
      .growth_interval = 4, .hysteresis = Hysteresis::consecutive, .hysteresis_steps = 3};
  expect_transitions(rules, {.loss_scale = 64, .hysteresis_left = 3},
                     {{true, 64, 0, 2, 1},
                      {true, 64, 0, 1, 2},
                      {false, 64, 1, 3, 0},  // refilled
                      {true, 64, 0, 2, 1},
                      {true, 64, 0, 1, 2},
                      {true, 32, 0, 0, 3},  // the third in a row
                      {true, 16, 0, 0, 4},
                      {false, 16, 1, 3, 0}});
}

TEST(LossScale, AHysteresisOfOneIsNone) {
  for (Hysteresis kind : {Hysteresis::until_growth, Hysteresis::consecutive})
    expect_transitions({.hysteresis = kind, .hysteresis_steps = 1}, {.loss_scale = 64, .hysteresis_left = 1},
                       {{true, 32, 0, 0, 1}, {true, 16, 0, 0, 2}});
}

TEST(LossScale, StaysWithinItsLimits) {
  expect_transitions({.growth_interval = 1, .minimum = 2, .maximum = 12}, {.loss_scale = 4},
                     {{true, 2, 0, 2, 1},
                      {true, 2, 0, 2, 2},
                      {false, 4, 0, 2, 0},
                      {false, 8, 0, 2, 0},
                      {false, 12, 0, 2, 0},
                      {false, 12, 0, 2, 0}});
}

TEST(LossScale, AFixedScaleStaysAndStillSkips) {
  expect_transitions({.dynamic = false, .growth_interval = 1}, {.loss_scale = 1},
                     {{false, 1, 0, 2, 0}, {true, 1, 0, 2, 1}, {false, 1, 0, 2, 0}});
}

// The whole path: a gradient that is too large for fp16 turns infinite, the step is skipped, and the scale
// backs off until the gradient fits.
TEST(LossScale, BacksOffUntilAnFp16GradientFits) {
  Model model(100);
  const std::vector<Segment> segments = {{.begin = 0, .count = 100}};
  const auto before = model.memory();
  std::vector<float> scales;
  TensorBuffer small(DType::f16, {100});
  while (model.now().updates == 0 && model.now().step < 20) {
    scales.push_back(model.now().loss_scale);
    small.fill_normal(5, 3.0 * model.now().loss_scale);  // about 10 times the scale at most
    kernels::cast({}, small, model.gradients);
    const bool moved_early = model.now().updates == 0 && model.memory() != before;
    ASSERT_FALSE(moved_early);
    model.step(segments);
  }
  EXPECT_EQ(model.now().updates, 1);
  EXPECT_EQ(model.now().skipped, static_cast<int64_t>(scales.size()) - 1);
  EXPECT_GE(scales.size(), 2u);
  for (size_t i = 0; i < scales.size(); ++i) EXPECT_EQ(scales[i], 65536.0f / static_cast<float>(1 << i));
  EXPECT_NE(model.memory(), before);
}

TEST(Optimizer, ASkippedStepMovesNothingButStep) {
  const std::vector<Segment> segments = {{.begin = 0, .count = 500, .decay = true},
                                         {.begin = 500, .count = 500}};
  for (double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                     -std::numeric_limits<double>::infinity()}) {
    Model model(1000);
    model.now().updates = 7;
    model.gradients.set(999, bad);
    const auto before = model.memory();
    model.step(segments);
    EXPECT_EQ(model.memory(), before);
    EXPECT_EQ(model.now().step, 1);
    EXPECT_EQ(model.now().updates, 7);
    EXPECT_EQ(model.now().nonfinite, 1);
    EXPECT_EQ(model.now().first_nonfinite, 1);
    EXPECT_EQ(model.now().gradient_norm, std::numeric_limits<float>::infinity());
  }
}

// Another rank's overflow arrives in state.nonfinite between the two calls.
TEST(Optimizer, AnOverflowElsewhereSkipsHereToo) {
  const std::vector<Segment> segments = {{.begin = 0, .count = 64}};
  Model model(64);
  const auto before = model.memory();
  kernels::gradient_statistics({}, segments, one(1), model.buffers);
  EXPECT_EQ(model.now().nonfinite, 0);
  model.now().nonfinite = 1;
  kernels::update_loss_scale({}, {}, model.buffers);
  kernels::adamw({}, segments, one(1), {}, model.buffers);
  EXPECT_EQ(model.memory(), before);
  EXPECT_EQ(model.now().loss_scale, 32768.0f);
}

TEST(Optimizer, StatisticsCountAndNameTheFirstNonFiniteSegment) {
  const std::vector<Segment> segments = {{.begin = 0, .count = 100},
                                         {.begin = 100, .count = 100, .trainable = false},
                                         {.begin = 200, .count = 100},
                                         {.begin = 300, .count = 100}};
  Model model(400);
  model.gradients.set(150, std::numeric_limits<double>::quiet_NaN());  // frozen: does not count
  kernels::gradient_statistics({}, segments, one(1), model.buffers);
  EXPECT_EQ(model.now().nonfinite, 0);
  EXPECT_EQ(model.now().first_nonfinite, -1);
  for (size_t i : {320u, 399u, 250u}) model.gradients.set(i, std::numeric_limits<double>::infinity());
  kernels::gradient_statistics({}, segments, one(1), model.buffers);
  EXPECT_EQ(model.now().nonfinite, 3);
  EXPECT_EQ(model.now().first_nonfinite, 2);
}

// The largest fp32 gradients square to more than fp32 holds; they are finite all the same.
TEST(Optimizer, TheNormIsExactAndDoesNotOverflow) {
  Model model(50000);
  model.gradients.fill_normal(9, 1e30);
  const std::vector<Segment> segments = {{.begin = 0, .count = 20000},
                                         {.begin = 20000, .count = 10000, .trainable = false},
                                         {.begin = 30000, .count = 20000}};
  double sum = 0;
  const auto g = model.gradients.values();
  for (size_t i = 0; i < g.size(); ++i)
    if (i < 20000 || i >= 30000) sum += g[i] * g[i];
  float first = 0;
  for (int threads : {1, 2, 3}) {
    kernels::set_threads(threads);
    kernels::gradient_statistics({}, segments, one(0.25), model.buffers);
    const double expected = std::sqrt(sum) * 0.25 / 65536.0;
    EXPECT_NEAR(model.now().gradient_norm, expected, 1e-7 * expected);
    EXPECT_EQ(model.now().nonfinite, 0);
    if (threads == 1) first = model.now().gradient_norm;
    EXPECT_EQ(model.now().gradient_norm, first);
  }
  kernels::set_threads(0);
}

// AdamW as in the paper, in fp64, from the same starting point.
struct Oracle {
  std::vector<double> master, m, v;
  void step(const std::vector<double>& g, const Segment& s, const AdamWParams& p, double lr, double factor,
            int t) {
    for (int64_t i = s.begin; i < s.begin + s.count; ++i) {
      const double gradient = factor * g[i];
      m[i] = p.beta1 * m[i] + (1.0 - p.beta1) * gradient;
      v[i] = p.beta2 * v[i] + (1.0 - p.beta2) * gradient * gradient;
      const double step = (m[i] / (1 - std::pow(double{p.beta1}, t))) /
                          (std::sqrt(v[i] / (1 - std::pow(double{p.beta2}, t))) + p.eps);
      master[i] -= lr * (step + (s.decay ? double{p.weight_decay} : 0.0) * master[i]);
    }
  }
};

// Ten updates. Each rounds master once (2^-24 of magnitude about 4) and takes a step of at most lr times a
// relative error of a few 2^-24 in m, v and the factors; 40 * 2^-24 covers it.
void expect_oracle(float clip) {
  constexpr int64_t kCount = 3000;
  const std::vector<Segment> segments = {{.begin = 0, .count = 1700, .decay = true},
                                         {.begin = 1700, .count = 300, .decay = true, .trainable = false},
                                         {.begin = 2000, .count = 1000}};
  Model model(kCount, DType::f16, {.loss_scale = 256});
  Oracle oracle{model.master.values(), model.m.values(), model.v.values()};
  const auto frozen = model.master.values();
  const AdamWParams params{.schedule = {.lr = 0.01f, .warmup = 4, .total = 20}, .clip = clip};
  for (int t = 1; t <= 10; ++t) {
    model.gradients.fill_normal(100 + t, 50);
    const auto g = model.gradients.values();
    double sum = 0;
    for (const Segment& s : segments)
      for (int64_t i = s.begin; i < s.begin + s.count && s.trainable; ++i)
        sum += std::pow(g[i] * 3.0 / 256, 2);
    const double norm = std::sqrt(sum), limit = clip > 0 ? std::min(1.0, clip / norm) : 1.0;
    for (const Segment& s : segments)
      if (s.trainable)
        oracle.step(g, s, params, kernels::learning_rate(params.schedule, t - 1), limit * 3.0 / 256, t);
    model.step(segments, {}, params, 3.0f);
    EXPECT_NEAR(model.now().gradient_norm, norm, 1e-6 * norm);
    EXPECT_EQ(model.gradients.values(), g);
  }
  EXPECT_EQ(model.now().updates, 10);
  const auto master = model.master.values(), weights = model.weights.values();
  for (size_t i = 0; i < master.size(); ++i) {
    EXPECT_NEAR(master[i], oracle.master[i], 40 * 0x1p-24) << i;
    EXPECT_EQ(weights[i], static_cast<float>(kernels::f16(static_cast<float>(master[i])))) << i;
    if (i >= 1700 && i < 2000) {
      EXPECT_EQ(master[i], frozen[i]);
    }
  }
}

TEST(Optimizer, AdamWMatchesFp64) { expect_oracle(0); }
TEST(Optimizer, ClippedAdamWMatchesFp64) { expect_oracle(0.7f); }

// A step that makes the scale grow still unscales by the scale its gradients were made with.
TEST(Optimizer, GrowthDoesNotTouchTheGradientsOfItsOwnStep) {
  const std::vector<Segment> segments = {{.begin = 0, .count = 256}};
  Model growing(256), steady(256);
  growing.step(segments, {.growth_interval = 1});
  steady.step(segments, {.growth_interval = 1000});
  EXPECT_EQ(growing.now().loss_scale, 2 * steady.now().loss_scale);
  EXPECT_EQ(growing.memory(), steady.memory());
}

// Small updates add up in the fp32 master although each is below half a step of fp16.
TEST(Optimizer, TheMasterKeepsWhatFp16WouldLose) {
  Model model(64);
  std::vector<double> ones(64, 1.0), zeros(64, 0.0);
  model.master.set(ones);
  model.weights.set(ones);
  model.m.set(zeros);
  model.v.set(zeros);
  model.gradients.set(std::vector<double>(64, 65536.0));
  const AdamWParams params{
      .schedule = {.kind = ScheduleKind::constant, .lr = 1e-4f}, .weight_decay = 0, .clip = 0};
  for (int i = 0; i < 20; ++i) model.step({{.begin = 0, .count = 64}}, {}, params);
  for (double w : model.weights.values()) EXPECT_NEAR(w, 1 - 20 * 1e-4, 0x1p-11);
  EXPECT_LT(model.weights.values()[0], 1.0);
}

TEST(Schedule, FollowsItsDefinition) {
  const Schedule cosine{.kind = ScheduleKind::cosine, .lr = 2.0f, .warmup = 10, .total = 110, .floor = 0.1f};
  EXPECT_FLOAT_EQ(kernels::learning_rate(cosine, 0), 0.2f);
  EXPECT_FLOAT_EQ(kernels::learning_rate(cosine, 9), 2.0f);
  EXPECT_FLOAT_EQ(kernels::learning_rate(cosine, 10), 2.0f);
  EXPECT_FLOAT_EQ(kernels::learning_rate(cosine, 60), 1.1f);
  EXPECT_FLOAT_EQ(kernels::learning_rate(cosine, 110), 0.2f);
  EXPECT_FLOAT_EQ(kernels::learning_rate(cosine, 1000), 0.2f);
  Schedule linear = cosine;
  linear.kind = ScheduleKind::linear;
  EXPECT_FLOAT_EQ(kernels::learning_rate(linear, 35), 2 * (1 - 0.9f * 0.25f));
  EXPECT_FLOAT_EQ(kernels::learning_rate(linear, 500), 0.2f);
  Schedule stable = cosine;
  stable.kind = ScheduleKind::warmup_stable_decay;
  stable.decay_fraction = 0.5f;
  EXPECT_FLOAT_EQ(kernels::learning_rate(stable, 54), 2.0f);
  EXPECT_FLOAT_EQ(kernels::learning_rate(stable, 55), 2.0f);
  EXPECT_NEAR(kernels::learning_rate(stable, 82), 2 * (1 - 0.9 * 27 / 55), 1e-6);
  EXPECT_FLOAT_EQ(kernels::learning_rate(stable, 110), 0.2f);
  stable.decay_fraction = 0;
  EXPECT_FLOAT_EQ(kernels::learning_rate(stable, 10), 2.0f);
  EXPECT_FLOAT_EQ(kernels::learning_rate(stable, 109), 2.0f);
  const Schedule constant{.kind = ScheduleKind::constant, .lr = 3.0f, .warmup = 0, .total = 1};
  EXPECT_FLOAT_EQ(kernels::learning_rate(constant, 0), 3.0f);
  EXPECT_FLOAT_EQ(kernels::learning_rate(constant, 12345), 3.0f);
}

TEST(LossScale, SeedsCarryTheScale) {
  Model model(8, DType::f16, {.loss_scale = 48.0f});
  TensorBuffer factors(DType::f32, {3}), seeds(DType::f32, {3});
  factors.set(std::vector<double>{0.5, -0.25, 3});
  kernels::loss_seeds({}, model.state, factors, seeds);
  EXPECT_EQ(seeds.values(), (std::vector<double>{24, -12, 144}));
}

TEST(Optimizer, RefusesSegmentsThatOverlap) {
  Model model(16);
  const std::vector<Segment> segments = {{.begin = 0, .count = 9}, {.begin = 8, .count = 2}};
  EXPECT_THROW(kernels::gradient_statistics({}, segments, one(1), model.buffers), kernels::ShapeError);
}

TEST(Optimizer, RefusesSegmentsOutsideTheBuffers) {
  Model model(16);
  const std::vector<Segment> segments = {{.begin = 8, .count = 9}};
  EXPECT_THROW(kernels::gradient_statistics({}, segments, one(1), model.buffers), kernels::ShapeError);
  EXPECT_THROW(kernels::adamw({}, segments, one(1), {}, model.buffers), kernels::ShapeError);
}

// Steps every shard of a model, exchanging only the sums; returns weights, master, m and v of all shards.
std::vector<std::vector<double>> step_in_shards(int ranks, const Model& whole, const OptimizerState& start,
                                                const std::vector<Segment>& segments,
                                                const AdamWParams& params, OptimizerState& last) {
  const TensorBuffer normaliser = one(0.5f);
  std::vector<OptimizerState> states(static_cast<size_t>(ranks), start);
  std::vector<std::unique_ptr<OptimizerShard>> shards;
  std::vector<double> total(kernels::kOptimizerPieces, 0.0);
  for (int r = 0; r < ranks; ++r) {
    const kernels::Tensor state(&states[static_cast<size_t>(r)], DType::u8, {sizeof(OptimizerState)});
    auto& one = *shards.emplace_back(std::make_unique<OptimizerShard>(whole.buffers, state, r, ranks));
    kernels::gradient_statistics({}, one.own(segments), normaliser, one.buffers);
    const auto sums = one.sums.values();
    for (size_t i = 0; i < total.size(); ++i) total[i] += sums[i];
  }
  const auto count = static_cast<size_t>(whole.master.tensor().numel());
  std::vector<std::vector<double>> moved(4, std::vector<double>(count, 0.0));
  for (const auto& shard : shards) {
    shard->sums.set(total);
    kernels::gradient_norm({}, normaliser, shard->buffers);
    kernels::update_loss_scale({}, {}, shard->buffers);
    int64_t updated = 0;
    const kernels::UpdateParts parts{.elements = 3 * shard->shard.piece,
                                     .updated = [&](int64_t begin, int64_t end) {
                                       EXPECT_EQ(begin, updated);
                                       updated = end;
                                     }};
    kernels::adamw({}, shard->own(segments), normaliser, params, shard->buffers, parts);
    EXPECT_EQ(updated, shard->padded / ranks);
    const TensorBuffer* own[] = {&shard->weights, &shard->master, &shard->m, &shard->v};
    for (size_t i = 0; i < 4; ++i) shard->give(*own[i], moved[i]);
    const auto weights = shard->weights.values();
    for (int64_t i = 0; i < shard->padded; ++i)
      if (i >= shard->elements || !shard->has(i)) {
        EXPECT_EQ(weights[static_cast<size_t>(i)], -77.0) << i;
      }
  }
  last = states.back();
  return moved;
}

TEST(Optimizer, ShardsOnSeveralRanksMoveLikeTheWholeBitForBit) {
  const int64_t count = 9000;  // pieces of 64
  const std::vector<Segment> segments = {
      {0, 2000, true, true}, {2000, 112, false, true}, {2112, 4000, true, false}, {6112, 2888, true, true}};
  AdamWParams params;
  params.clip = 0.5f;  // the norm matters
  for (const double poison : {0.0, static_cast<double>(INFINITY)}) {
    Model whole(count), before(count);
    if (poison != 0)
      for (Model* model : {&whole, &before}) model->gradients.set(count - 7, INFINITY);
    whole.step(segments, {}, params, 0.5f);
    // What no step moves.
    const std::vector<double> frozen = before.weights.values();
    for (int ranks : {1, 2, 3, 7, 150}) {
      OptimizerState state;
      auto moved = step_in_shards(ranks, before, {}, segments, params, state);
      for (size_t i = 0; i < frozen.size(); ++i)
        if (poison != 0 || (i >= 2112 && i < 6112)) moved[0][i] = frozen[i];
      EXPECT_EQ(moved[0], whole.weights.values()) << ranks;
      EXPECT_EQ(moved[1], whole.master.values()) << ranks;
      EXPECT_EQ(moved[2], whole.m.values()) << ranks;
      EXPECT_EQ(moved[3], whole.v.values()) << ranks;
      EXPECT_EQ(state.gradient_norm, whole.now().gradient_norm) << ranks;
      EXPECT_EQ(state.skip, poison != 0) << ranks;
      EXPECT_EQ(state.updates, whole.now().updates) << ranks;
    }
  }
}

TEST(Optimizer, WhatIsNotFiniteIsFoundInAShard) {
  Model whole(9000);
  whole.gradients.set(6500, std::nan(""));
  whole.gradients.set(300, INFINITY);
  const std::vector<Segment> segments = {{0, 6000}, {6000, 3000}};
  int32_t found = 0;
  for (int r = 0; r < 3; ++r) {
    OptimizerState state;
    OptimizerShard shard(whole.buffers, kernels::Tensor(&state, DType::u8, {sizeof(state)}), r, 3);
    kernels::gradient_statistics({}, shard.own(segments), one(1), shard.buffers);
    EXPECT_EQ(state.nonfinite, shard.has(6500) + shard.has(300));
    const int32_t first = shard.has(300) ? 0 : shard.has(6500) ? 1 : -1;
    EXPECT_EQ(state.first_nonfinite, first);
    found += state.nonfinite;
  }
  EXPECT_EQ(found, 2);
}

TEST(Optimizer, WhatIsNoShardIsRefused) {
  Model whole(9000);
  OptimizerState state;
  const kernels::Tensor at(&state, DType::u8, {sizeof(state)});
  OptimizerShard shard(whole.buffers, at, 1, 2);
  const auto refused = [&](const kernels::OptimizerBuffers& given, const kernels::UpdateParts& parts = {}) {
    kernels::OptimizerBuffers buffers = given;
    EXPECT_THROW(kernels::adamw({}, {}, one(1), {}, buffers, parts), kernels::ShapeError);
  };
  kernels::OptimizerBuffers buffers = shard.buffers;
  buffers.shard.piece = 100;
  refused(buffers);
  buffers = shard.buffers;
  buffers.shard.rank = 2;
  refused(buffers);
  buffers = shard.buffers;
  buffers.sums = {};
  refused(buffers);
  buffers = shard.buffers;
  buffers.weights = buffers.weights.slice(0, buffers.master.numel());
  refused(buffers);
  refused(shard.buffers, {.elements = shard.shard.piece / 2});
  kernels::adamw({}, {}, one(1), {}, shard.buffers, {.elements = shard.shard.piece});
}

}  // namespace

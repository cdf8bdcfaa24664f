// One training step after another: what the host reads late, what stays where it is, and the same on a GPU.
#include "trainer/train/step.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>

#include "kernels/core/stream.h"
#include "kernels/ops/cast.h"
#include "tests/support/step_run.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/tiny_run.h"
#include "trainer/model/heads/vocabulary.h"
#include "trainer/train/loop.h"

namespace {

using support::StepRun;

constexpr int64_t kVocabulary = 300;

class Step : public testing::Test {
 protected:
  void SetUp() override { support::write_random_tokens(folder_.path() / "data", kVocabulary, 40, 257); }

  // Sequences as long as the context, so that every micro-batch has one shape; the last of a step is smaller.
  configs::Config config(const std::string& compute = "fp16") {
    configs::Config c = support::tiny_config(folder_.path());
    c.model.width = 128;
    c.model.ffn_width = 192;
    c.heads.medusa = 1;
    c.precision.compute = compute;
    c.optim.warmup = 2;
    c.train.steps = 100;
    c.train.micro_batch = 3;
    return c;
  }

  support::TemporaryFolder folder_;
};

void expect_same(const std::vector<trainer::StepMetrics>& a, const std::vector<trainer::StepMetrics>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].step, b[i].step);
    EXPECT_EQ(a[i].losses, b[i].losses);
    EXPECT_EQ(a[i].gradient_norm, b[i].gradient_norm);
    EXPECT_EQ(a[i].loss_scale, b[i].loss_scale);
    EXPECT_EQ(a[i].skipped, b[i].skipped);
    EXPECT_EQ(a[i].learning_rate, b[i].learning_rate);
  }
}

TEST_F(Step, ResultsReadLateAreTheSame) {
  StepRun at_once(config(), kVocabulary, {}, 0), late(config(), kVocabulary, {}, 1);
  expect_same(at_once.steps(6), late.steps(6));
  EXPECT_EQ(at_once.master(), late.master());
}

TEST_F(Step, ResultsComeAsLateAsTheyAreAllowedTo) {
  StepRun run(config(), kVocabulary, {}, 2);
  EXPECT_FALSE(run.stepper().run(false));
  EXPECT_FALSE(run.stepper().run(true));
  const auto first = run.stepper().run(false);
  ASSERT_TRUE(first);
  EXPECT_EQ(first->step, 0);
  EXPECT_FALSE(first->stop_requested);
  EXPECT_EQ(run.stepper().attempts(), 3);
  const auto second = run.stepper().flush();
  ASSERT_TRUE(second);
  EXPECT_EQ(second->step, 1);
  EXPECT_TRUE(second->stop_requested) << "asked in the second step";
  EXPECT_TRUE(run.stepper().flush());
  EXPECT_FALSE(run.stepper().flush());
}

// Two steps, then two more with gradients that hold nothing but NaN before each of them.
std::vector<trainer::StepMetrics> steps_over_nan(StepRun& run, const kernels::Context& ctx) {
  auto metrics = run.steps(2);
  for (int i = 0; i < 2; ++i) {
    kernels::fill(ctx, run.model().parameters().buffers().gradients, std::nanf(""));
    metrics.push_back(run.steps(1).front());
  }
  return metrics;
}

TEST_F(Step, NothingIsLeftOfEarlierGradients) {
  for (const bool tied : {true, false})
    for (const bool sequential : {true, false}) {
      auto c = config("fp32");
      c.model.tie_embeddings = tied;
      c.heads.medusa_sequential = sequential;
      c.heads.medusa = c.heads.mtp = 2;
      StepRun clean(c, kVocabulary, {}), soiled(c, kVocabulary, {});
      expect_same(clean.steps(4), steps_over_nan(soiled, {}));
      EXPECT_EQ(clean.master(), soiled.master()) << "tied " << tied << ", sequential " << sequential;
    }
}

TEST_F(Step, OverflowIsNamedByTensorAndRankAlsoWhenReadLate) {
  for (const size_t late : {0, 1}) {
    auto overflowing = config();
    overflowing.precision.loss_scale_initial = 4294967296.0;
    StepRun run(overflowing, kVocabulary, {}, late);
    const auto metrics = run.steps(24);
    ASSERT_TRUE(metrics[0].skipped && metrics[4].skipped) << "a scale of 2^32 overflows fp16";
    EXPECT_FALSE(metrics.back().skipped) << "the scale came down to where training goes on";
    EXPECT_FALSE(metrics[0].nonfinite_tensor.empty());
    EXPECT_EQ(metrics[0].nonfinite_rank, -1) << "the rank is looked for after the first skipped step";
    EXPECT_EQ(metrics[4].nonfinite_rank, 0);
    EXPECT_EQ(metrics[1].loss_scale, metrics[0].loss_scale / 2);
  }
}

// One rank whose exchanges can be made to fail, as a GPU's do: the calls return, a later poll() tells.
class FailingRanks final : public comm::Communicator {
 public:
  explicit FailingRanks(const bool& failed) : failed_(failed) {}
  int rank() const override { return one_->rank(); }
  int size() const override { return one_->size(); }
  void all_reduce(kernels::Tensor t, comm::Reduce op) override { one_->all_reduce(t, op); }
  std::unique_ptr<comm::Request> all_reduce_async(kernels::Tensor t, comm::Reduce op) override {
    return one_->all_reduce_async(t, op);
  }
  std::unique_ptr<comm::Request> reduce_scatter_async(kernels::Tensor t, comm::Reduce op) override {
    return one_->reduce_scatter_async(t, op);
  }
  void broadcast(kernels::Tensor t, int root) override { one_->broadcast(t, root); }
  void transfer(kernels::Tensor t, int from, int to) override { one_->transfer(t, from, to); }
  std::unique_ptr<comm::Request> all_gather_async(kernels::Tensor t) override {
    return one_->all_gather_async(t);
  }
  void barrier() override {}
  void poll() override {
    if (failed_) throw comm::CommTimeout("rank 0: given up");
  }

 private:
  std::unique_ptr<comm::Communicator> one_ = comm::make_local_communicator();
  const bool& failed_;
};

TEST_F(Step, WhatLandsAfterAFailedExchangeIsNoResult) {
  bool failed = false;
  StepRun run(config(), kVocabulary, {}, 1, std::make_unique<FailingRanks>(failed));
  EXPECT_FALSE(run.stepper().run(false));
  EXPECT_TRUE(run.stepper().run(false));
  failed = true;
  EXPECT_THROW(run.stepper().flush(), comm::CommTimeout);
}

TEST_F(Step, WhatAStepTakesItGivesBack) {
  StepRun run(config(), kVocabulary, {});
  const auto marks = [&] {
    const auto& m = run.stepper().rehearsal();
    return std::array{m.saved->mark(), m.scratch->mark()};
  };
  const auto before = marks();
  run.steps(4);
  EXPECT_EQ(before, marks());
}

// A batch's sequences in the shape of another: the empty ones that fill it up change nothing.
TEST_F(Step, BatchesFillTheirShape) {
  const data::LoaderParams params{1, 8, 3, 64, 2};
  data::Batch batch;
  batch.tokens = {5, 6, 7, 8};
  batch.positions = {0, 1, 0, 1};
  batch.cu_seqlens = {0, 2, 4};
  batch.offsets = 2;
  batch.targets = {6, -1, 8, -1, -1, -1, -1, -1};
  batch.weights = {1, 0, 1, 0, 0, 0, 0, 0};
  const trainer::BatchShape shape = trainer::shape_of(batch, params);
  EXPECT_EQ(shape.rows, 4);
  EXPECT_EQ(shape.sequences, 3);
  std::vector<char> block(trainer::batch_bytes(shape, params), 'x');
  trainer::pack_batch(batch, shape, params, block.data());
  trainer::BlockCutter cutter(block.data());
  const trainer::ModelBatch cut = trainer::cut_batch(cutter, shape, params);
  const int32_t* cu = cut.cu_seqlens.as<int32_t>();
  EXPECT_EQ(std::vector<int32_t>(cu, cu + 4), (std::vector<int32_t>{0, 2, 4, 4}));
  EXPECT_EQ(cut.tokens.as<int32_t>()[3], 8);
  EXPECT_EQ(cut.targets.as<int32_t>()[2], 8);
  EXPECT_EQ(cut.weights.as<float>()[0], 1.0f);
  EXPECT_FALSE(cut.hints.uniform);
  EXPECT_EQ(cut.hints.longest, 64);
  // Two sequences that fill a context of two rows each are all there is.
  const trainer::BatchShape full = trainer::shape_of(batch, {1, 8, 3, 2, 2});
  EXPECT_TRUE(full.uniform);
  EXPECT_EQ(full.sequences, 2);
  // Memory is measured for every shape that a data set of sequences of all lengths gives.
  support::prepare_tiny_data(folder_.path() / "text");
  const data::TokenDataset dataset(folder_.path() / "text" / "data", "train", 64);
  const data::BatchLoader loader(dataset, {1, 7, 3, 64, 2});
  const auto known = trainer::batch_shapes(loader.params());
  for (int step = 0; step < 30; ++step)
    for (const auto& samples : loader.plan(step).micro_batches) {
      const auto given = trainer::shape_of(loader.load(samples), loader.params());
      EXPECT_EQ(std::count(known.begin(), known.end(), given), 1) << given.rows << " rows";
    }
}

TEST_F(Step, LogitsOnAGpuComeInFewEqualParts) {
  const kernels::Device gpu{kernels::Device::Kind::cuda, 0};
  EXPECT_EQ(trainer::logit_rows(gpu, 32768, 50304, kernels::DType::f16), 16384) << "3.3 GB, 2 GiB at once";
  EXPECT_EQ(trainer::logit_rows(gpu, 1000, 50304, kernels::DType::f16), 1000);
  EXPECT_EQ(trainer::logit_rows({}, 32768, 50304, kernels::DType::f16), 512);
  const int64_t rows = trainer::logit_rows(gpu, 40001, 100000, kernels::DType::f32);
  EXPECT_LE(rows * 100000 * 4, (int64_t{2} << 30) + 128 * 100000 * 4) << "a part is rounded up";
  EXPECT_EQ((40001 + rows - 1) / rows, 8) << "no more parts than 2 GiB ask for";
  EXPECT_GT(40001 - 7 * rows, rows - 8 * 128)
      << "the last is as long, but for what rounding adds to the others";
}

class StepCuda : public Step {
 protected:
  void SetUp() override {
    if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU here: " << kernels::cuda_problem();
    Step::SetUp();
    stream_ = std::make_unique<kernels::OwnedStream>(kGpu);
    ctx_ = {kGpu, stream_->get(), nullptr, false};
  }
  static constexpr kernels::Device kGpu{kernels::Device::Kind::cuda, 0};
  std::unique_ptr<kernels::OwnedStream> stream_;
  kernels::Context ctx_;
};

// The mean over the step's tokens of losses whose logits are rounded to 2^-11 relative, over weights that
// are: well under 2^-9 relative (tests/trainer/ranks_mpi_test.cpp).
constexpr double kHalfTolerance = 2e-3;

void expect_close(const std::vector<double>& a, const std::vector<double>& b, double tolerance) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], tolerance * std::abs(a[i])) << "step " << i;
}

TEST_F(StepCuda, LossesAreThoseOfTheCpu) {
  for (const auto& [compute, tolerance] :
       {std::pair{"fp32", 1e-4}, std::pair{"fp16", kHalfTolerance}, std::pair{"bf16", 8 * kHalfTolerance}}) {
    StepRun cpu(config(compute), kVocabulary, {}), gpu(config(compute), kVocabulary, ctx_);
    SCOPED_TRACE(compute);
    expect_close(StepRun::losses(cpu.steps(12)), StepRun::losses(gpu.steps(12)), tolerance);
  }
}

TEST_F(StepCuda, CapturedEqualsEager) {
  auto eager = config(), captured = config();
  eager.train.graph = false;
  StepRun a(eager, kVocabulary, ctx_), b(captured, kVocabulary, ctx_);
  expect_close(StepRun::losses(a.steps(12)), StepRun::losses(b.steps(12)), kHalfTolerance);
  EXPECT_FALSE(a.stepper().captured());
  EXPECT_TRUE(b.stepper().captured());
}

TEST_F(StepCuda, NothingIsLeftOfEarlierGradients) {
  auto c = config();
  c.heads.medusa = c.heads.mtp = 2;
  StepRun clean(c, kVocabulary, ctx_), soiled(c, kVocabulary, ctx_);
  expect_same(clean.steps(4), steps_over_nan(soiled, ctx_));
}

TEST_F(StepCuda, NeitherWaitsForTheDeviceNorTakesMemoryInAStep) {
  for (const bool graph : {false, true}) {
    auto c = config();
    c.train.graph = graph;
    StepRun run(c, kVocabulary, ctx_);
    run.steps(4);  // algorithms are chosen, graphs recorded
    const auto& counters = kernels::device_counters();
    const int64_t waits = counters.synchronizations, allocations = counters.allocations;
    run.steps(6);
    EXPECT_EQ(counters.synchronizations, waits) << "graph " << graph;
    EXPECT_EQ(counters.allocations, allocations) << "graph " << graph;
  }
}

TEST_F(StepCuda, PlanIsWhatAStepTakes) {
  StepRun run(config(), kVocabulary, ctx_);
  std::map<std::string, int64_t> planned, taken;
  for (const auto& row : trainer::plan_memory(config(), kVocabulary, 1, ctx_).rows)
    if (row.segment != "apart") planned[row.segment] += row.bytes;
  for (const auto& arena : run.model().parameters().memory())
    taken[arena->segment()] += static_cast<int64_t>(arena->high_water());
  const auto& step = run.stepper().rehearsal();
  for (const auto* arena : {step.saved.get(), step.scratch.get(), step.step.get()})
    taken[arena->segment()] += static_cast<int64_t>(arena->high_water());
  EXPECT_EQ(planned, taken) << "to the byte";
  run.steps(2);  // and what is planned is enough
}

TEST_F(StepCuda, OverflowSkipsTheStep) {
  auto overflowing = config();
  overflowing.precision.loss_scale_initial = 4294967296.0;
  StepRun run(overflowing, kVocabulary, ctx_);
  const auto metrics = run.steps(24);
  EXPECT_TRUE(metrics.front().skipped);
  EXPECT_EQ(metrics[1].loss_scale, metrics[0].loss_scale / 2);
  EXPECT_EQ(metrics[4].nonfinite_rank, 0);
  EXPECT_FALSE(metrics.back().skipped) << "the scale came down to where training goes on";
}

}  // namespace

// What the table of cases does not see on a GPU: the same bits every time, recorded operations, values that
// are not finite, indices beyond their tables.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <tuple>

#include "kernels/core/stream.h"
#include "kernels/ops/cast.h"
#include "kernels/ops/cross_entropy.h"
#include "kernels/ops/embedding.h"
#include "kernels/ops/norm.h"
#include "kernels/ops/rotary.h"
#include "tests/support/rehearsed.h"
#include "tests/support/tensor_buffer.h"

namespace {

using kernels::Context;
using kernels::Device;
using kernels::DType;
using support::TensorBuffer;

constexpr Device kGpu{Device::Kind::cuda, 0};
constexpr double kInfinity = std::numeric_limits<double>::infinity();

TensorBuffer buffer_of(DType dtype, kernels::Shape shape, const std::vector<double>& values) {
  return support::buffer_of(dtype, shape, values, kGpu);
}

// |a - b| <= relative |b| + shared M, where M is the largest magnitude of b.
void expect_near(const char* name, const std::vector<double>& a, const std::vector<double>& b,
                 double relative, double shared) {
  double largest = 0;
  for (double v : b) largest = std::max(largest, std::abs(v));
  for (size_t i = 0; i < b.size(); ++i)
    ASSERT_TRUE(std::abs(a[i] - b[i]) <= relative * std::abs(b[i]) + shared * largest)
        << name << "[" << i << "] is " << a[i] << ", on the CPU " << b[i];
}

class CudaElementwise : public testing::Test {
 protected:
  void SetUp() override {
    if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU";
    stream_.emplace(kGpu);
  }
  kernels::Stream stream() const { return stream_->get(); }
  // Rehearses a call, then makes it.
  void run(const std::function<void(const Context&)>& call) const {
    support::run_rehearsed(kGpu, stream(), call);
  }
  double loss_of(TensorBuffer& logits, int target, std::optional<double> seed) const {
    const auto targets = buffer_of(DType::i32, {1}, {static_cast<double>(target)}),
               weights = buffer_of(DType::f32, {1}, {1});
    auto loss = buffer_of(DType::f64, {1}, {0});
    const TensorBuffer given = seed ? buffer_of(DType::f32, {1}, {*seed}) : TensorBuffer();
    run([&](const Context& ctx) { kernels::cross_entropy(ctx, logits, targets, weights, given, loss); });
    return loss.values()[0];
  }

 private:
  std::optional<kernels::OwnedStream> stream_;
};

// The sums of a training step's backward, recorded and launched again: the same bits, whatever the order in
// which blocks ran, and the same as without a graph.
TEST_F(CudaElementwise, SumsOverRowsAreTheSameBitsEveryTime) {
  constexpr int64_t kRows = 5000, kWidth = 768, kVocabulary = 301;
  std::vector<double> tokens(kRows), positions(kRows);
  for (int64_t i = 0; i < kRows; ++i) {
    tokens[i] = static_cast<double>(i % 3 == 0 ? 7 : i * i % kVocabulary);
    positions[i] = static_cast<double>(i % 1024);
  }
  const auto token = buffer_of(DType::i32, {kRows}, tokens),
             position = buffer_of(DType::i32, {kRows}, positions);
  TensorBuffer dy(DType::f16, {kRows, kWidth}, kGpu), x(DType::f16, {kRows, kWidth}, kGpu),
      gain(DType::f16, {kWidth}, kGpu), y(DType::f16, {kRows, kWidth}, kGpu),
      statistics(DType::f32, {kRows, 1, 2}, kGpu), dx(DType::f16, {kRows, kWidth}, kGpu);
  dy.fill_normal(1);
  x.fill_normal(2);
  gain.fill_normal(3);
  TensorBuffer table(DType::f32, {kVocabulary, kWidth}, kGpu), places(DType::f32, {1024, kWidth}, kGpu),
      dgain(DType::f32, {kWidth}, kGpu), dbias(DType::f32, {kWidth}, kGpu), loss(DType::f64, {1}, kGpu),
      logits(DType::f16, {kRows, kVocabulary}, kGpu), source(DType::f16, {kRows, kVocabulary}, kGpu);
  source.fill_normal(4);
  const auto weights = buffer_of(DType::f32, {kRows}, std::vector<double>(kRows, 0.5)),
             seed = buffer_of(DType::f32, {1}, {64});
  const auto all = [&](const Context& ctx) {
    const kernels::NormParams layer{.kind = kernels::NormKind::layer};
    kernels::norm(ctx, layer, x, gain, {}, y, statistics);
    kernels::norm_backward(ctx, layer, dy, x, gain, statistics, dx, false, dgain, dbias);
    kernels::embedding_backward(ctx, dx, token, table, position, places);
    kernels::cast(ctx, source, logits);
    kernels::cross_entropy(ctx, logits, token, weights, seed, loss);
  };
  TensorBuffer* results[] = {&table, &places, &dgain, &dbias, &loss, &logits, &dx};
  const auto clear = [&] {
    for (auto* r : results) r->poison();
    for (auto* r : {&table, &places, &dgain, &dbias, &loss})
      r->set(std::vector<double>(static_cast<size_t>(r->tensor().numel()), 0.25));
  };
  clear();
  run(all);
  std::vector<std::vector<char>> expected;
  for (auto* r : results) expected.push_back(r->bytes());
  EXPECT_FALSE(std::isnan(loss.values()[0]));

  const support::Rehearsed rehearsed(kGpu, stream(), all);
  const int64_t taken = kernels::device_counters().allocations,
                waited = kernels::device_counters().synchronizations;
  kernels::Graph graph;
  kernels::Graph::begin(stream());
  all(rehearsed.ctx);
  graph.end(stream());
  EXPECT_EQ(kernels::device_counters().allocations, taken);
  EXPECT_EQ(kernels::device_counters().synchronizations, waited);
  for (int repeat = 0; repeat < 5; ++repeat) {
    clear();
    graph.launch(stream());
    kernels::synchronize(kGpu, stream());
    for (size_t i = 0; i < std::size(results); ++i)
      EXPECT_TRUE(results[i]->bytes() == expected[i]) << "result " << i << ", launch " << repeat;
  }
}

struct NormRun {
  TensorBuffer x, dy, gain, bias, y, statistics, dx, dgain, dbias;
  NormRun(DType dtype, int64_t rows, int64_t columns, int64_t groups, Device device)
      : x(dtype, {rows, columns}, device),
        dy(dtype, {rows, columns}, device),
        gain(dtype, {columns}, device),
        bias(dtype, {columns}, device),
        y(dtype, {rows, columns}, device),
        statistics(DType::f32, {rows, groups, 2}, device),
        dx(dtype, {rows, columns}, device),
        dgain(DType::f32, {columns}, device),
        dbias(DType::f32, {columns}, device) {
    uint64_t seed = 1;
    for (auto* t : {&x, &dy, &gain, &bias, &dx, &dgain, &dbias}) t->fill_normal(seed++);
    y.poison();
    statistics.poison();
  }
  void run(const Context& ctx, const kernels::NormParams& params) {
    kernels::norm(ctx, params, x, gain, bias, y, statistics);
    kernels::norm_backward(ctx, params, dy, x, gain, statistics, dx, true, dgain, dbias);
  }
};

// More rows than blocks take at once, several times over: one row for each way of spreading its columns over
// threads. Both sides round once to the output's type and sum in fp32, in different orders.
TEST_F(CudaElementwise, NormsOfManyRowsAgreeWithTheCpu) {
  struct Case {
    int64_t rows, columns, groups;
  };
  for (const Case& c : {Case{1201, 12 * 64, 12},
                        {9001, 128, 1},
                        {9001, 136, 1},
                        {1777, 768, 1},
                        {2501, 776, 1},
                        {1111, 1600, 1},
                        {401, 2304, 1},
                        {301, 4104, 1},
                        {149, 8192, 1}})
    for (const auto& [dtype, kind] :
         {std::pair{DType::f16, kernels::NormKind::layer}, {DType::f32, kernels::NormKind::rms}}) {
      SCOPED_TRACE(testing::Message() << c.columns << " columns, kind " << static_cast<int>(kind));
      const kernels::NormParams params{.kind = kind, .groups = c.groups};
      NormRun gpu(dtype, c.rows, c.columns, c.groups, kGpu), cpu(dtype, c.rows, c.columns, c.groups, {});
      run([&](const Context& ctx) { gpu.run(ctx, params); });
      cpu.run({}, params);
      const double u = dtype == DType::f16 ? 0x1p-11 : 0x1p-24;
      for (const auto& [name, a, b, rounding] : {std::tuple{"y", &gpu.y, &cpu.y, u},
                                                 {"statistics", &gpu.statistics, &cpu.statistics, 0x1p-24},
                                                 {"dx", &gpu.dx, &cpu.dx, u},
                                                 {"dgain", &gpu.dgain, &cpu.dgain, 0x1p-24},
                                                 {"dbias", &gpu.dbias, &cpu.dbias, 0x1p-24}})
        expect_near(name, a->values(), b->values(), 2 * rounding,
                    4 * 0x1p-24 * static_cast<double>(c.rows + c.columns));
    }
}

TEST_F(CudaElementwise, ExtremeLogits) {
  const std::vector<double> values = {-60000, 60000, 0, -kInfinity, 1};
  auto sure = buffer_of(DType::f16, {1, 5}, values), wrong = buffer_of(DType::f16, {1, 5}, values);
  EXPECT_EQ(loss_of(sure, 1, 1), 0);
  EXPECT_EQ(sure.values(), (std::vector<double>{0, 0, 0, 0, 0}));
  EXPECT_EQ(loss_of(wrong, 0, 2), 120000);
  EXPECT_EQ(wrong.values(), (std::vector<double>{-2, 2, 0, 0, 0}));
  auto impossible = buffer_of(DType::f32, {1, 3}, {0, 1, -kInfinity});
  const auto before = impossible.bytes();
  EXPECT_EQ(loss_of(impossible, 2, std::nullopt), kInfinity);
  EXPECT_EQ(impossible.bytes(), before);
}

// They reach the loss and every gradient of the row, or a loss scaler would never skip the step.
TEST_F(CudaElementwise, NonFiniteLogitsAndUnknownTargetsAreSeen) {
  for (DType dtype : {DType::f16, DType::bf16, DType::f32})
    for (const int64_t vocabulary : {3, 40, 70001})
      for (const int fault : {0, 1, 2, 3}) {
        std::vector<double> values(static_cast<size_t>(vocabulary), 0.5);
        if (fault == 0) values.back() = std::nan("");
        if (fault == 1) values[1] = kInfinity;
        if (fault == 2) std::fill(values.begin(), values.end(), std::nan(""));
        auto logits = buffer_of(dtype, {1, vocabulary}, values);
        EXPECT_TRUE(std::isnan(loss_of(logits, fault == 3 ? static_cast<int>(vocabulary) : 0, 1.0)));
        for (double g : logits.values()) ASSERT_TRUE(std::isnan(g));
      }
}

// Rows of weight 0 or without a target are cleared whatever they hold.
TEST_F(CudaElementwise, RowsThatDoNotCountAreCleared) {
  constexpr int64_t kVocabulary = 1001;
  std::vector<double> values(2 * kVocabulary, std::nan(""));
  auto logits = buffer_of(DType::f16, {2, kVocabulary}, values);
  const auto targets = buffer_of(DType::i32, {2}, {5, -1}), weights = buffer_of(DType::f32, {2}, {0, 1}),
             seed = buffer_of(DType::f32, {1}, {1});
  auto loss = buffer_of(DType::f64, {1}, {3});
  run([&](const Context& ctx) { kernels::cross_entropy(ctx, logits, targets, weights, seed, loss); });
  EXPECT_EQ(loss.values()[0], 3);
  for (double g : logits.values()) ASSERT_EQ(g, 0);
}

TEST_F(CudaElementwise, TokensBeyondTheTableAreNaNAndLeaveItAlone) {
  const auto tokens = buffer_of(DType::i32, {4}, {1, 5, -1, 4}),
             table = buffer_of(DType::f32, {5, 2}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9});
  TensorBuffer y(DType::f32, {4, 2}, kGpu), dtable(DType::f32, {5, 2}, kGpu);
  run([&](const Context& ctx) { kernels::embedding(ctx, tokens, table, {}, {}, y); });
  const auto rows = y.values();
  EXPECT_EQ(rows[0], 2);
  EXPECT_TRUE(std::isnan(rows[2]) && std::isnan(rows[3]));
  EXPECT_EQ(rows[4], 0);
  EXPECT_EQ(rows[7], 9);
  const auto dy = buffer_of(DType::f32, {4, 2}, {1, 2, 3, 4, 5, 6, 7, 8});
  dtable.set(std::vector<double>(10, 0.5));
  run([&](const Context& ctx) { kernels::embedding_backward(ctx, dy, tokens, dtable, {}, {}); });
  EXPECT_EQ(dtable.values(), (std::vector<double>{0.5, 0.5, 1.5, 2.5, 0.5, 0.5, 0.5, 0.5, 7.5, 8.5}));
}

// Far positions: the angle is still exact to fp32's last digits.
TEST_F(CudaElementwise, RotaryAnglesHoldAtFarPositions) {
  const std::vector<double> positions = {0, 131071, 8388607, 134217727};
  TensorBuffer on_gpu(DType::f32, {4, 1, 64}, kGpu);
  on_gpu.fill_normal(9);
  const auto x = on_gpu.values();
  const auto position = buffer_of(DType::i32, {4}, positions);
  run([&](const Context& ctx) { kernels::rotary(ctx, on_gpu, position, 10000.0f); });
  const auto y = on_gpu.values();
  for (size_t i = 0; i < 4; ++i)
    for (size_t d = 0; d < 32; ++d) {
      const double angle = positions[i] * std::pow(10000.0, -static_cast<double>(d) / 32);
      const double a = x[i * 64 + d], b = x[i * 64 + 32 + d];
      // Cosine and sine to 2 ulp of fp32 each; fp64 itself leaves 2^27 * 2^-53 of the furthest angle.
      const double tolerance = 8 * 0x1p-24 * (std::abs(a) + std::abs(b));
      EXPECT_NEAR(y[i * 64 + d], a * std::cos(angle) - b * std::sin(angle), tolerance) << i << " " << d;
      EXPECT_NEAR(y[i * 64 + 32 + d], a * std::sin(angle) + b * std::cos(angle), tolerance) << i << " " << d;
    }
}

}  // namespace

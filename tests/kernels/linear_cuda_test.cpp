// The linear layers on a GPU, beyond the table of cases: rows that do not depend on their neighbours, and
// products recorded in a graph.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <optional>

#include "kernels/core/stream.h"
#include "kernels/cuda/gemm.h"
#include "tests/kernels/rows_layer.h"

namespace {

using kernels::Context;
using kernels::DType;
using support::TensorBuffer;

constexpr kernels::Device kGpu{kernels::Device::Kind::cuda, 0};
constexpr DType kTypes[] = {DType::f16, DType::bf16, DType::f32};

class CudaLinear : public testing::Test {
 protected:
  void SetUp() override {
    if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU";
  }
  const Context ctx_{.device = kGpu, .stream = {}};
};
using CudaLinearRows = CudaLinear;

struct Sizes {
  int64_t out, in;
  rows_layer::Form form;
};
// A test of its own for each, of which compute-sanitizer may run several beside each other.
class CudaLinearRowsSizes : public CudaLinear, public testing::WithParamInterface<Sizes> {};

// One slice of inputs, several, and more than a cluster has blocks, of one panel a block and of more; outputs
// that end inside a panel, and more than blocks take at once.
INSTANTIATE_TEST_SUITE_P(
    Of, CudaLinearRowsSizes,
    [] {
      using rows_layer::Form;
      return testing::Values(
          Sizes{330, 75, Form::plain}, Sizes{50, 1700, Form::add}, Sizes{4200, 768, Form::gelu},
          Sizes{33, 7000, Form::plain}, Sizes{400, 7000, Form::plain}, Sizes{768, 768, Form::add},
          Sizes{2304, 768, Form::norm}, Sizes{40, 200, Form::norm}, Sizes{40, 1600, Form::norm},
          Sizes{5300, 200, Form::norm}, Sizes{3000, 1700, Form::add}, Sizes{1600, 6400, Form::add});
    }(),
    [](const auto& info) { return fmt::format("{}_from_{}", info.param.out, info.param.in); });

TEST_P(CudaLinearRowsSizes, ARowDoesNotDependOnItsNeighbours) {
  const Sizes& s = GetParam();
  for (DType dtype : kTypes)
    rows_layer::expect_rows_alone(ctx_, dtype, s.out, s.in,
                                  s.form == rows_layer::Form::plain ? DType::f32 : dtype, s.form);
}

// Vocabularies have a form of their own beyond 16 rows, with which fewer rows have to agree: all tiles of one
// slice, warps without any, two slices.
TEST_F(CudaLinearRows, ARowOfAVocabularyDoesNotDependOnItsNeighbours) {
  constexpr int64_t kOut = 9603;
  for (DType dtype : {DType::f16, DType::bf16}) {
    rows_layer::expect_rows_alone(ctx_, dtype, kOut, 768, DType::f32);
    rows_layer::expect_rows_alone(ctx_, dtype, kOut, 200, dtype);
    rows_layer::expect_rows_alone(ctx_, dtype, kOut, 904, DType::f32);
  }
}

TEST_F(CudaLinearRows, ANormIsComputedWithTheLayerWhereItsSumsArePacked) {
  const rows_layer::RowsLayer layer(ctx_, DType::f16, 40, 200);
  const TensorBuffer x(DType::f16, {3, 200}, kGpu);
  kernels::LinearWeight w = layer.norm_weight();
  EXPECT_TRUE(kernels::computes_norm(kGpu, x, w));
  w.norm.sums = {};
  EXPECT_FALSE(kernels::computes_norm(kGpu, x, w));
}

TEST_F(CudaLinearRows, ANaNStaysInItsRow) {
  for (DType dtype : kTypes) rows_layer::expect_nan_stays_in_its_row(ctx_, dtype);
}

// Two layers behind one another start early and must still wait for their input.
TEST_F(CudaLinearRows, AChainGivesTheSameEveryTimeInAGraph) {
  constexpr int64_t kWidth = 768, kLayers = 12;
  std::vector<rows_layer::RowsLayer> layers;
  for (int64_t i = 0; i < kLayers; ++i) {
    layers.emplace_back(ctx_, DType::f16, kWidth, kWidth);
    layers.back().matrix.fill_normal(static_cast<uint64_t>(10 + i), 1 / 28.0);
    layers.back().pack(ctx_);
  }
  std::vector<TensorBuffer> x(kLayers + 1);
  for (auto& buffer : x) buffer = TensorBuffer(DType::f16, {4, kWidth}, kGpu);
  x[0].fill_normal(5);
  std::vector<char> expected;
  for (size_t i = 0; i < layers.size(); ++i) {
    expected = layers[i].rows_of(ctx_, x[i], DType::f16);
    x[i + 1] = TensorBuffer(DType::f16, {4, kWidth}, kGpu);
    kernels::linear(ctx_, x[i], layers[i].weight(), x[i + 1]);
    kernels::synchronize(kGpu, ctx_.stream);
  }
  const kernels::OwnedStream stream(kGpu);
  const Context captured{.device = kGpu, .stream = stream.get()};
  kernels::Graph graph;
  kernels::Graph::begin(stream.get());
  for (size_t i = 0; i < layers.size(); ++i) kernels::linear(captured, x[i], layers[i].weight(), x[i + 1]);
  graph.end(stream.get());
  for (int repeat = 0; repeat < 20; ++repeat) {
    for (size_t i = 1; i < x.size(); ++i) x[i].poison();
    graph.launch(stream.get());
    kernels::synchronize(kGpu, stream.get());
    ASSERT_TRUE(x.back().bytes() == expected) << "launch " << repeat;
  }
}

// What was run once may be recorded: no choosing, no waiting, no memory taken.
TEST_F(CudaLinear, RecordedProductsGiveWhatTheEagerOnesGave) {
  constexpr int64_t kRows = 200, kIn = 64, kOut = 136;
  TensorBuffer x(DType::f16, {kRows, kIn}, kGpu), w(DType::f16, {kOut, kIn}, kGpu),
      y(DType::f16, {kRows, kOut}, kGpu), dx(DType::f16, {kRows, kIn}, kGpu),
      dw(DType::f32, {kOut, kIn}, kGpu), db(DType::f32, {kOut}, kGpu);
  x.fill_normal(1);
  w.fill_normal(2, 0.1);
  const kernels::OwnedStream stream(kGpu);
  const Context ctx{.device = kGpu, .stream = stream.get()};
  const auto run = [&] {
    kernels::linear(ctx, x, {w, {}, {}}, y);
    kernels::linear_backward_input(ctx, y, w, dx);
    kernels::linear_backward_weight(ctx, y, x, dw, db);
  };
  const auto prepare = [&] {
    y.poison(), dx.poison();
    dw.fill_normal(3), db.fill_normal(4);
  };
  prepare();
  run();
  const auto dx_bytes = dx.bytes(), dw_bytes = dw.bytes(), db_bytes = db.bytes();
  prepare();
  kernels::Graph graph;
  auto& counters = kernels::device_counters();
  const int64_t waits = counters.synchronizations, allocations = counters.allocations;
  kernels::Graph::begin(stream.get());
  run();
  graph.end(stream.get());
  graph.launch(stream.get());
  EXPECT_EQ(counters.synchronizations, waits);
  EXPECT_EQ(counters.allocations, allocations);
  EXPECT_TRUE(dx.bytes() == dx_bytes);
  EXPECT_TRUE(dw.bytes() == dw_bytes);
  EXPECT_TRUE(db.bytes() == db_bytes);
}

// An fp32 sum of `count` terms, relative to the sum of their sizes.
void expect_sum(double got, size_t count, const std::function<double(size_t)>& term) {
  double exact = 0, size = 0;
  for (size_t k = 0; k < count; ++k) exact += term(k), size += std::abs(term(k));
  EXPECT_NEAR(got, exact, static_cast<double>(count) * 0x1p-24 * size);
}

// Sums of a's columns on the side, which a layer's gradient takes only where they were measured to pay.
TEST_F(CudaLinear, AProductSumsTheColumnsOfItsGradient) {
  constexpr size_t kRows = 192, kOut = 136, kIn = 72;
  for (const DType type : {DType::f16, DType::bf16})
    for (const bool accumulate : {false, true}) {
      TensorBuffer dy(type, {kRows, kOut}, kGpu), x(type, {kRows, kIn}, kGpu),
          dw(DType::f32, {kOut, kIn}, kGpu), sums(DType::f32, {kOut}, kGpu);
      dy.fill_normal(1), x.fill_normal(2), dw.fill_normal(3), sums.poison();
      const auto before = dw.values(), a = dy.values(), b = x.values();
      if constexpr (kernels::kCudaEnabled) {
        ASSERT_TRUE(kernels::cuda::multiply(ctx_, {.a = dy,
                                                   .b = x,
                                                   .c = dw,
                                                   .transposed_a = true,
                                                   .accumulate = accumulate,
                                                   .epilogue = kernels::cuda::Epilogue::column_sums,
                                                   .bias = sums}));
      }
      const auto product = dw.values(), of_columns = sums.values();
      for (size_t m = 0; m < kOut; ++m) {
        expect_sum(of_columns[m], kRows, [&](size_t k) { return a[k * kOut + m]; });
        for (size_t n = 0; n < kIn; n += 7)
          expect_sum(product[m * kIn + n], kRows + accumulate, [&](size_t k) {
            return k == kRows ? before[m * kIn + n] : a[k * kOut + m] * b[k * kIn + n];
          });
      }
    }
}

// Inside a capture a product never seen before takes the library's first suggestion, as it does when
// measuring is switched off.
TEST_F(CudaLinear, AFirstProductMayBeRecorded) {
  constexpr int64_t kRows = 96, kIn = 48, kOut = 80;
  TensorBuffer x(DType::bf16, {kRows, kIn}, kGpu), w(DType::bf16, {kOut, kIn}, kGpu),
      y(DType::bf16, {kRows, kOut}, kGpu);
  x.fill_normal(1);
  w.fill_normal(2, 0.1);
  const kernels::OwnedStream stream(kGpu);
  const Context ctx{.device = kGpu, .stream = stream.get()};
  // The library and its workspace are there from a first product on.
  TensorBuffer one(DType::bf16, {8, 8}, kGpu), two(DType::bf16, {8, 8}, kGpu);
  one.fill_normal(3);
  kernels::measure_products(false);
  kernels::linear(ctx, one, {one, {}, {}}, two);
  kernels::measure_products(true);
  kernels::synchronize(kGpu, stream.get());
  kernels::Graph graph;
  kernels::Graph::begin(stream.get());
  kernels::linear(ctx, x, {w, {}, {}}, y);
  graph.end(stream.get());
  graph.launch(stream.get());
  const auto recorded = y.bytes();
  y.poison();
  kernels::linear(ctx, x, {w, {}, {}}, y);
  EXPECT_TRUE(y.bytes() == recorded);
}

}  // namespace

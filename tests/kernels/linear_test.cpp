#include "kernels/ops/linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/core/parallel.h"
#include "tests/kernels/rows_layer.h"
#include "tests/support/instruction_sets.h"

namespace {

using kernels::DType;
using support::TensorBuffer;

TEST(LinearRows, ARowDoesNotDependOnItsNeighbours) {
  support::with_each_instruction_set([&](const char* set) {
    SCOPED_TRACE(set);
    for (DType dtype : {DType::f16, DType::bf16, DType::f32, DType::f64})
      for (int threads : {1, 3}) {
        SCOPED_TRACE(threads);
        kernels::set_threads(threads);
        rows_layer::expect_rows_alone({}, dtype, 330, 75, kernels::main_dtype(dtype));
      }
  });
  kernels::set_threads(0);
}

TEST(LinearRows, ANaNStaysInItsRow) {
  for (DType dtype : {DType::f16, DType::bf16, DType::f32, DType::f64})
    rows_layer::expect_nan_stays_in_its_row({}, dtype);
}

TEST(LinearRows, PanelsHoldTheMatrixAndZeros) {
  const rows_layer::RowsLayer layer({}, DType::f16, 40, 5);
  const auto w = layer.matrix.values(), p = layer.panels.values();
  ASSERT_EQ(p.size(), 2u * 5 * 32);
  for (int64_t row = 0; row < 64; ++row)
    for (int64_t i = 0; i < 5; ++i)
      EXPECT_EQ(p[(row / 32 * 5 + i) * 32 + row % 32], row < 40 ? w[row * 5 + i] : 0.0) << row << ", " << i;
}

TEST(LinearRows, SumsOfANormByHand) {
  TensorBuffer w(DType::f16, {2, 3}), gain(DType::f16, {3}), bias(DType::f16, {3}), own_bias(DType::f16, {2});
  TensorBuffer sums(DType::f32, {2, 2});
  w.set(std::vector<double>{1, 2, -3, 0.5, 0, 4});
  gain.set(std::vector<double>{2, -1, 0.25});
  bias.set(std::vector<double>{1, 3, 2});
  own_bias.set(std::vector<double>{4, -0.5});
  kernels::Tensor view = sums;
  kernels::pack_norm({}, {w, own_bias, {}, {{}, gain, bias, {}}}, view);
  EXPECT_EQ(sums.values(), (std::vector<double>{-0.75, 5, 2, 8}));
  kernels::pack_norm({}, {w, {}, {}, {{}, gain, bias, {}}}, view);
  EXPECT_EQ(sums.values(), (std::vector<double>{-0.75, 1, 2, 8.5}));
  kernels::pack_norm({}, {w, {}, {}, {{}, gain, {}, {}}}, view);
  EXPECT_EQ(sums.values(), (std::vector<double>{-0.75, 0, 2, 0}));
}

// The matrix product against fp64 over fp16's whole range: subnormals, the largest numbers, ordinary ones.
// Sums are fp32: |error| <= K 2^-24 sum |a b|, which the range makes worth stating per element.
TEST(Linear, HoldsOverTheWholeRangeOfFp16) {
  constexpr int64_t kRows = 70, kIn = 200, kOut = 90;
  TensorBuffer x(DType::f16, {kRows, kIn}), w(DType::f16, {kOut, kIn}), y(DType::f32, {kRows, kOut});
  auto values = support::normal_values(kRows * kIn, 5);
  for (size_t i = 0; i < values.size(); ++i) {
    const size_t row = i / kIn;
    values[i] = row % 3 == 0   ? values[i] * 0x1p-22
                : row % 3 == 1 ? std::clamp(values[i] * 4e4, -65504.0, 65504.0)
                               : values[i];
  }
  x.set(values);
  w.fill_normal(6, 3e-5);
  kernels::linear({}, x, {w, {}, {}}, y);
  const auto a = x.values(), b = w.values(), c = y.values();
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < kOut; ++j) {
      double sum = 0, magnitude = 0;
      for (int64_t l = 0; l < kIn; ++l) {
        sum += a[i * kIn + l] * b[j * kIn + l];
        magnitude += std::abs(a[i * kIn + l] * b[j * kIn + l]);
      }
      ASSERT_LE(std::abs(c[i * kOut + j] - sum), kIn * 0x1p-24 * magnitude) << i << ", " << j;
    }
}

// An overflow anywhere in fp16 must reach the gradients as a number that is not finite.
TEST(Linear, PassesOnWhatIsNotFinite) {
  TensorBuffer x(DType::f16, {65, 70}), w(DType::f16, {66, 70}), y(DType::f16, {65, 66});
  x.fill_normal(7);
  w.fill_normal(8);
  x.set(5 * 70 + 3, std::numeric_limits<double>::infinity());
  x.set(9 * 70 + 69, std::numeric_limits<double>::quiet_NaN());
  kernels::linear({}, x, {w, {}, {}}, y);
  const auto values = y.values();
  for (size_t i = 0; i < values.size(); ++i)
    EXPECT_EQ(std::isfinite(values[i]), i / 66 != 5 && i / 66 != 9) << i;
}

TEST(Linear, NamesTheArgumentThatDoesNotFit) {
  TensorBuffer x(DType::f16, {3, 8}), w(DType::f16, {4, 9}), y(DType::f16, {3, 4});
  try {
    kernels::linear({}, x, {w, {}, {}}, y);
    FAIL() << "accepted";
  } catch (const kernels::ShapeError& e) {
    EXPECT_STREQ(e.what(), "linear: x is fp16 (3, 8), expected (3, 9)");
  }
  TensorBuffer dy(DType::f16, {3, 4}), dw(DType::f16, {4, 8});
  EXPECT_THROW(kernels::linear_backward_weight({}, dy, x, dw), kernels::ShapeError);  // dw must be fp32
  TensorBuffer dbias(DType::f32, {5});
  EXPECT_THROW(kernels::linear_backward_bias({}, dy, dbias), kernels::ShapeError);
}

}  // namespace

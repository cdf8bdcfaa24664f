#include "kernels/ops/norm.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/tensor_buffer.h"

namespace {

using kernels::DType;
using kernels::NormKind;
using kernels::ShapeError;
using support::buffer_of;
using support::TensorBuffer;

TEST(Norm, RmsByHand) {
  // mean(x^2) = (9 + 16) / 2 = 12.5
  const auto x = buffer_of(DType::f64, {1, 2}, {3, 4}), gain = buffer_of(DType::f64, {2}, {2, -1});
  TensorBuffer y(DType::f64, {1, 2}), statistics(DType::f64, {1, 1, 2});
  kernels::norm({}, {.eps = 0}, x, gain, {}, y, statistics);
  const double r = 1 / std::sqrt(12.5);
  EXPECT_NEAR(y.values()[0], 6 * r, 1e-15);
  EXPECT_NEAR(y.values()[1], -4 * r, 1e-15);
  EXPECT_EQ(statistics.values()[0], 0);
  EXPECT_NEAR(statistics.values()[1], r, 1e-15);
}

TEST(Norm, LayerByHandInGroups) {
  // Each group has mean m and values m - 2, m + 2: variance 4.
  const auto x = buffer_of(DType::f64, {1, 4}, {1, 5, 98, 102});
  const auto gain = buffer_of(DType::f64, {4}, {1, 2, 3, 4}),
             bias = buffer_of(DType::f64, {4}, {.1, .2, .3, .4});
  TensorBuffer y(DType::f64, {1, 4}), statistics(DType::f64, {1, 2, 2});
  kernels::norm({}, {.kind = NormKind::layer, .groups = 2, .eps = 0}, x, gain, bias, y, statistics);
  const std::vector<double> expected = {-0.9, 2.2, -2.7, 4.4}, saved = {3, 0.5, 100, 0.5};
  for (int i = 0; i < 4; ++i) {
    EXPECT_NEAR(y.values()[i], expected[i], 1e-14);
    EXPECT_NEAR(statistics.values()[i], saved[i], 1e-14);
  }
}

// Squares of fp16's largest values do not fit fp16; the statistics are fp32. One rounding to fp16 remains.
TEST(Norm, LargestHalvesStayFinite) {
  constexpr int64_t kColumns = 300;
  std::vector<double> values(kColumns);
  for (int64_t i = 0; i < kColumns; ++i) values[i] = i % 2 ? 60000 : -60000;
  const auto x = buffer_of(DType::f16, {1, kColumns}, values);
  const auto gain = buffer_of(DType::f16, {kColumns}, std::vector<double>(kColumns, 1.5));
  for (auto kind : {NormKind::rms, NormKind::layer}) {
    TensorBuffer y(DType::f16, {1, kColumns});
    kernels::norm({}, {.kind = kind}, x, gain, {}, y, {});
    for (int64_t i = 0; i < kColumns; ++i) EXPECT_EQ(y.values()[i], i % 2 ? 1.5 : -1.5);
  }
}

// A mean far above the spread: two passes keep the variance (E[x^2] - mean^2 in fp32 would be 0 or negative).
TEST(Norm, LayerSurvivesALargeMean) {
  struct Row {
    DType dtype;
    double mean, apart, tolerance;
  };
  // Neighbouring numbers of each type, or nearly; columns that are no whole number of vectors.
  for (const Row& row : {Row{DType::f32, 10000, 0.5, 1e-6}, Row{DType::f16, 100.03125, 0.03125, 1e-3},
                         Row{DType::bf16, 3.0078125, 0.0078125, 8e-3}})
    for (const int64_t columns : {64, 24, 22, 200}) {
      SCOPED_TRACE(fmt::format("{} columns, {}", columns, name_of(row.dtype)));
      std::vector<double> values(static_cast<size_t>(columns));
      for (size_t i = 0; i < values.size(); ++i) values[i] = row.mean + (i % 2 ? row.apart : -row.apart);
      const auto x = buffer_of(row.dtype, {1, columns}, values);
      const auto gain = buffer_of(row.dtype, {columns}, std::vector<double>(values.size(), 1));
      TensorBuffer y(row.dtype, {1, columns});
      kernels::norm({}, {.kind = NormKind::layer, .eps = 0}, x, gain, {}, y, {});
      for (size_t i = 0; i < values.size(); ++i) EXPECT_NEAR(y.values()[i], i % 2 ? 1 : -1, row.tolerance);
    }
}

TEST(Norm, ResidualNormIsAddThenNorm) {
  constexpr int64_t kRows = 5, kColumns = 41;
  TensorBuffer residual(DType::f16, {kRows, kColumns}), branch(DType::f16, {kRows, kColumns}),
      gain(DType::f16, {kColumns}), sum(DType::f16, {kRows, kColumns}), y(DType::f16, {kRows, kColumns}),
      expected(DType::f16, {kRows, kColumns});
  residual.fill_normal(1, 2);
  branch.fill_normal(2, 2);
  gain.fill_normal(3);
  kernels::residual_norm({}, {}, residual, branch, gain, {}, sum, y, {});
  kernels::norm({}, {}, sum, gain, {}, expected, {});
  EXPECT_EQ(y.bytes(), expected.bytes());
  const auto a = residual.values(), b = branch.values(), s = sum.values();
  for (size_t i = 0; i < s.size(); ++i)
    EXPECT_EQ(s[i], float(kernels::f16(static_cast<float>(a[i]) + static_cast<float>(b[i]))));
}

TEST(Norm, WrongArgumentsAreNamed) {
  TensorBuffer x(DType::f16, {4, 6}), y(DType::f16, {4, 6}), gain(DType::f16, {6}),
      short_gain(DType::f16, {5}), wide(DType::f32, {6}), other(DType::bf16, {4, 6});
  EXPECT_THROW(kernels::norm({}, {.groups = 4}, x, gain, {}, y, {}), ShapeError);
  EXPECT_THROW(kernels::norm({}, {.groups = 0}, x, gain, {}, y, {}), ShapeError);
  EXPECT_THROW(kernels::norm({}, {}, x, short_gain, {}, y, {}), ShapeError);
  EXPECT_THROW(kernels::norm({}, {}, x, wide, {}, y, {}), ShapeError);
  EXPECT_THROW(kernels::norm({}, {}, other, gain, {}, y, {}), ShapeError);
  try {
    kernels::norm({}, {}, x, short_gain, {}, y, {});
  } catch (const ShapeError& e) {
    EXPECT_STREQ(e.what(), "norm: gain is fp16 (5), expected (6)");
  }
}

}  // namespace

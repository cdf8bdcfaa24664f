#include "kernels/ops/activation.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>

#include "tests/support/tensor_buffer.h"

namespace {

using kernels::DType;
using kernels::ShapeError;
using support::TensorBuffer;

double silu(double x) { return x / (1 + std::exp(-x)); }
double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

std::vector<double> sweep(double from, double to, int64_t count) {
  std::vector<double> x(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i)
    x[static_cast<size_t>(i)] = from + (to - from) * static_cast<double>(i) / static_cast<double>(count - 1);
  return x;
}

// The fp64 code against the C library: within a few units in the last place of the largest intermediate.
TEST(Activation, MatchesTheFormulas) {
  constexpr int64_t kCount = 2001;
  const auto values = sweep(-40, 40, kCount);
  TensorBuffer x(DType::f64, {1, kCount}), zero(DType::f64, {1, kCount}), y(DType::f64, {1, kCount});
  x.set(values);
  zero.set(std::vector<double>(kCount, 0.0));
  kernels::gelu({}, x, y);
  for (size_t i = 0; i < kCount; ++i) EXPECT_NEAR(y.values()[i], gelu(values[i]), 1e-13) << values[i];
  y.poison();
  kernels::silu_add({}, zero, x, y);
  for (size_t i = 0; i < kCount; ++i)
    EXPECT_NEAR(y.values()[i], silu(values[i]), 4e-15 * (1 + std::abs(values[i]))) << values[i];
}

// silu(x) = x / (1 + exp(-x)) to the ends of fp32: exp is within 2 units in the last place, the sum, the
// quotient and the product round once each.
TEST(Activation, ExponentialIsAccurateInFp32) {
  constexpr int64_t kCount = 100001;
  TensorBuffer x(DType::f32, {1, kCount}), zero(DType::f32, {1, kCount}), y(DType::f32, {1, kCount});
  x.set(sweep(-87, 87, kCount));
  zero.set(std::vector<double>(kCount, 0.0));
  kernels::silu_add({}, zero, x, y);
  const auto values = x.values(), given = y.values();
  for (size_t i = 0; i < kCount; ++i)
    ASSERT_NEAR(given[i], silu(values[i]), std::abs(silu(values[i])) * 6 * 0x1p-24) << values[i];
}

TEST(Activation, SwigluGatesTheSecondHalf) {
  TensorBuffer x(DType::f64, {2, 6}), y(DType::f64, {2, 3});
  x.set(std::vector<double>{1, -2, 3, 10, 20, 30, -1, 0.5, 2, -1, -2, -3});
  kernels::swiglu({}, x, y);
  const std::vector<double> expected = {silu(1) * 10, silu(-2) * 20,  silu(3) * 30,
                                        -silu(-1),    -2 * silu(0.5), -3 * silu(2)};
  for (size_t i = 0; i < 6; ++i) EXPECT_NEAR(y.values()[i], expected[i], 1e-13);
}

// Where exp overflows or underflows, values and slopes take their limits and stay numbers.
TEST(Activation, ExtremesStayFinite) {
  const std::vector<double> extremes = {60000, -60000, 90, -90, 105, -105, 2000, -2000};
  const int64_t n = static_cast<int64_t>(extremes.size());
  for (DType dtype : {DType::f16, DType::bf16, DType::f32, DType::f64}) {
    TensorBuffer x(dtype, {1, n}), ones(dtype, {1, n}), y(dtype, {1, n}), dx(dtype, {1, n});
    x.set(extremes);
    ones.set(std::vector<double>(extremes.size(), 1.0));
    const auto given = x.values();
    kernels::gelu({}, x, y);
    kernels::gelu_backward({}, ones, x, dx);
    for (size_t i = 0; i < extremes.size(); ++i) {
      EXPECT_EQ(y.values()[i], given[i] > 0 ? given[i] : 0);
      EXPECT_EQ(dx.values()[i], given[i] > 0 ? 1 : 0);
    }
    dx.poison();
    kernels::silu_add_backward({}, ones, x, dx);
    for (size_t i = 0; i < extremes.size(); ++i)
      EXPECT_NEAR(dx.values()[i], given[i] > 0 ? 1 : 0, 1e-30) << given[i];
  }
}

TEST(Activation, NotANumberIsKept) {
  const double nan = std::nan("");
  for (DType dtype : {DType::f16, DType::bf16, DType::f32, DType::f64}) {
    TensorBuffer x(dtype, {1, 3}), y(dtype, {1, 3});
    x.set(std::vector<double>{1, nan, 2});
    kernels::gelu({}, x, y);
    EXPECT_TRUE(std::isnan(y.values()[1]));
    EXPECT_FALSE(std::isnan(y.values()[0]) || std::isnan(y.values()[2]));
    kernels::silu_add({}, y, x, y);
    EXPECT_TRUE(std::isnan(y.values()[1]));
  }
}

// Loading and storing in vectors agrees with dtype.h, for every 16-bit pattern: x + 0 and x + x.
template <typename T>
void check_every_pattern() {
  constexpr int64_t kColumns = 65536 / 16 + 1;  // an odd length: ends of rows are covered too
  TensorBuffer x(kernels::dtype_of<T>(), {16, kColumns}), zero(x.tensor().dtype, {16, kColumns}),
      same(x.tensor().dtype, {16, kColumns}), twice(x.tensor().dtype, {16, kColumns});
  zero.set(std::vector<double>(16 * kColumns, 0.0));
  T* bits = x.tensor().as<T>();
  for (int64_t i = 0; i < 16 * kColumns; ++i) bits[i].bits = static_cast<uint16_t>(i);
  kernels::add({}, x, zero, same);
  kernels::add({}, x, x, twice);
  for (int64_t i = 0; i < 16 * kColumns; ++i) {
    const float value = bits[i];
    const T expected(value + 0.0f), doubled(value + value);
    const T given = same.tensor().as<T>()[i], given_twice = twice.tensor().as<T>()[i];
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(float(given)) && std::isnan(float(given_twice))) << "pattern " << i;
    } else {
      ASSERT_EQ(given.bits, expected.bits) << "pattern " << i;
      ASSERT_EQ(given_twice.bits, doubled.bits) << "pattern " << i;
    }
  }
}
TEST(Activation, EveryHalfIsLoadedAndStored) { check_every_pattern<kernels::f16>(); }
TEST(Activation, EveryBfloatIsLoadedAndStored) { check_every_pattern<kernels::bf16>(); }

// fp32 values that lie exactly between two bf16 neighbours, and just beside the middle.
TEST(Activation, SumsRoundToNearestEven) {
  constexpr int64_t kCount = 4096;
  TensorBuffer a(DType::bf16, {1, kCount}), b(DType::bf16, {1, kCount}), y(DType::bf16, {1, kCount});
  a.fill_normal(1, 1, 1);
  std::vector<double> halves(kCount);
  for (int64_t i = 0; i < kCount; ++i)
    halves[i] = std::ldexp(1.0 + static_cast<double>(i % 3), -9 - static_cast<int>(i % 4));
  b.set(halves);
  kernels::add({}, a, b, y);
  for (int64_t i = 0; i < kCount; ++i) {
    const auto* pa = a.tensor().as<kernels::bf16>();
    const auto* pb = b.tensor().as<kernels::bf16>();
    ASSERT_EQ(y.tensor().as<kernels::bf16>()[i].bits, kernels::bf16(float(pa[i]) + float(pb[i])).bits) << i;
  }
}

TEST(Activation, WrongArgumentsAreNamed) {
  TensorBuffer x(DType::f16, {2, 6}), y(DType::f16, {2, 4}), wide(DType::f32, {2, 3}),
      half(DType::f16, {2, 3});
  EXPECT_THROW(kernels::swiglu({}, x, y), ShapeError);
  EXPECT_THROW(kernels::swiglu({}, x, wide), ShapeError);
  EXPECT_THROW(kernels::gelu({}, x, half), ShapeError);
  EXPECT_THROW(kernels::add({}, half, wide, half), ShapeError);
  EXPECT_THROW(kernels::swiglu_backward({}, half, x, half), ShapeError);
}

}  // namespace

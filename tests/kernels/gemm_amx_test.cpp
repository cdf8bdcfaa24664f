// The AMX matrix product against fp64 sums of the same fp16 or bf16 values.
#include "kernels/cpu/gemm_amx.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/core/philox.h"

namespace {

using namespace kernels;

template <typename T>
std::vector<T> random_values(int64_t count, uint64_t seed, float scale) {
  std::vector<T> x(count);
  for (int64_t i = 0; i < count; ++i) x[i] = T(scale * normal(seed, Purpose::test, i));
  return x;
}

// Sums are fp32: the error of a sum of k terms is below k 2^-24 times the sum of magnitudes. The part of a
// product of fp16 values that is left out adds at most 2^-18.
template <typename T>
void check(int64_t m, int64_t n, int64_t k, bool transposed_a, bool transposed_b, bool accumulate,
           float scale) {
  SCOPED_TRACE(testing::Message() << m << " x " << n << " x " << k << (transposed_a ? " a^T" : "")
                                  << (transposed_b ? " b^T" : "") << " " << name_of(dtype_of<T>()));
  auto a = random_values<T>(m * k, 1, scale), b = random_values<T>(k * n, 2, 1.0f);
  const float start = accumulate ? 0.5f : std::numeric_limits<float>::quiet_NaN();
  std::vector<float> c(m * n, start);
  const Tensor ta(a.data(), dtype_of<T>(), transposed_a ? Shape{k, m} : Shape{m, k});
  const Tensor tb(b.data(), dtype_of<T>(), transposed_b ? Shape{n, k} : Shape{k, n});
  cpu::gemm_amx({ta, transposed_a}, {tb, transposed_b}, {}, accumulate, Tensor(c.data(), DType::f32, {m, n}));
  const double left_out = dtype_of<T>() == DType::f16 ? 0x1.0p-18 : 0.0;
  const double tolerance = static_cast<double>(k) * 0x1.0p-24 + left_out;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = accumulate ? 0.5 : 0.0, magnitude = std::abs(sum);
      for (int64_t l = 0; l < k; ++l) {
        const double product =
            static_cast<double>(static_cast<float>(a[transposed_a ? l * m + i : i * k + l])) *
            static_cast<double>(static_cast<float>(b[transposed_b ? j * k + l : l * n + j]));
        sum += product;
        magnitude += std::abs(product);
      }
      ASSERT_NEAR(c[i * n + j], sum, tolerance * magnitude) << i << ", " << j;
    }
}

TEST(GemmAmx, EqualsFp64SumsOfTheSameValues) {
  if (!cpu::amx_usable()) GTEST_SKIP() << "this processor has no AMX-BF16";
  for (bool ta : {false, true})
    for (bool tb : {false, true}) {
      check<f16>(37, 45, 71, ta, tb, false, 1.0f);
      check<f16>(64, 32, 96, ta, tb, true, 1.0f);
      check<f16>(17, 33, 1100, ta, tb, false, 1.0f);
      check<bf16>(50, 20, 65, ta, tb, true, 1.0f);
    }
  // Values around fp16's smallest normal number, most of them subnormal.
  check<f16>(32, 32, 64, false, true, false, 0x1.0p-15f);
}

TEST(GemmAmx, OverflowStaysVisible) {
  if (!cpu::amx_usable()) GTEST_SKIP() << "this processor has no AMX-BF16";
  auto a = random_values<f16>(32 * 32, 3, 1.0f), b = random_values<f16>(32 * 32, 4, 1.0f);
  a[5 * 32 + 7] = f16(std::numeric_limits<float>::infinity());
  std::vector<float> c(32 * 32);
  cpu::gemm_amx({Tensor(a.data(), DType::f16, {32, 32})}, {Tensor(b.data(), DType::f16, {32, 32})}, {}, false,
                Tensor(c.data(), DType::f32, {32, 32}));
  for (int64_t j = 0; j < 32; ++j) EXPECT_FALSE(std::isfinite(c[5 * 32 + j]));
  EXPECT_TRUE(std::isfinite(c[6 * 32]));
}

}  // namespace

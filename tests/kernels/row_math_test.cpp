#include "kernels/core/row_math.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/core/philox.h"

namespace {

using kernels::row_draw;

// Lengths around lanes and blocks.
constexpr int64_t kLengths[] = {1, 2, 15, 16, 17, 1023, 1024, 1025, 3000, 50304};

// Of every size from 2^-24 to 1, as the probabilities of a vocabulary are.
std::vector<float> numbers(int64_t n, uint64_t seed) {
  std::vector<float> x(static_cast<size_t>(n));
  for (size_t i = 0; i < x.size(); ++i) {
    const auto random = kernels::philox(seed, kernels::Purpose::test, i);
    x[i] = std::ldexp(1 + static_cast<float>(random[0] % 1000) / 1000, -static_cast<int>(random[1] % 25));
  }
  return x;
}

// fp64 sums of n numbers err by less than n 2^-53 of the sum of their sizes.
TEST(RowMath, SumsAndLargest) {
  for (const int64_t n : kLengths) {
    const std::vector<float> x = numbers(n, 1), y = numbers(n, 2);
    long double dot = 0;
    for (size_t i = 0; i < x.size(); ++i) dot += static_cast<long double>(x[i]) * y[i];
    EXPECT_NEAR(kernels::row_dot(x.data(), y.data(), n), static_cast<double>(dot),
                static_cast<double>(n * dot) * 0x1p-53);
    EXPECT_EQ(kernels::row_argmax(x.data(), n), std::max_element(x.begin(), x.end()) - x.begin());
    // The first of equals; negative numbers and minus infinity.
    std::vector<float> low(x.size(), -INFINITY);
    EXPECT_EQ(kernels::row_argmax(low.data(), n), 0);
    low[static_cast<size_t>(n / 2)] = low.back() = -3;
    EXPECT_EQ(kernels::row_argmax(low.data(), n), n / 2);
  }
}

// A model that has diverged still gets tokens of its vocabulary.
TEST(RowMath, NaNGivesIndicesOfTheRow) {
  for (const int64_t n : kLengths)
    for (const int64_t step : {int64_t{1}, int64_t{3}}) {
      std::vector<float> x = numbers(n, 6);
      for (int64_t i = 0; i < n; i += step) x[static_cast<size_t>(i)] = NAN;
      for (const int64_t i : {kernels::row_argmax(x.data(), n), row_draw(x.data(), n, 0.5f)}) {
        EXPECT_GE(i, 0);
        EXPECT_LT(i, n);
      }
    }
}

TEST(RowMath, SubtractsAndNormalises) {
  for (const int64_t n : kLengths) {
    std::vector<float> x = numbers(n, 3);
    const std::vector<float> y = numbers(n, 4);
    std::vector<float> expected = x;
    double total = 0;
    for (size_t i = 0; i < x.size(); ++i) total += expected[i] = std::max(x[i] - y[i], 0.0f);
    kernels::row_subtract(x.data(), y.data(), x.data(), n);
    EXPECT_EQ(x, expected);
    EXPECT_EQ(kernels::row_normalise(x.data(), n), total > 0);
    for (size_t i = 0; i < x.size() && total > 0; ++i)
      EXPECT_NEAR(x[i], expected[i] / total, x[i] * 0x1p-22) << n << ", " << i;
    std::fill(x.begin(), x.end(), 0.0f);
    EXPECT_FALSE(kernels::row_normalise(x.data(), n));
  }
}

// Where the sum up to a number first exceeds u times the whole sum, up to the rounding of sums.
TEST(RowMath, DrawsWhereTheSumPassesItsTarget) {
  for (const int64_t n : kLengths) {
    std::vector<float> x = numbers(n, 5);
    for (size_t i = 0; i < x.size(); ++i)
      if (x.size() > 20 && (i / 1024 % 2 == 1 || i % 3 == 0)) x[i] = 0;  // whole blocks, too
    long double total = 0;
    for (const float v : x) total += v;
    for (const float u : {0.0f, 1e-7f, 0.25f, 0.5f, 0.9f, 0.999f, 0x1.fffffep-1f}) {
      const int64_t drawn = row_draw(x.data(), n, u);
      ASSERT_GE(drawn, 0);
      ASSERT_LT(drawn, n);
      EXPECT_GT(x[static_cast<size_t>(drawn)], 0) << n << ", " << u;
      long double before = 0;
      for (int64_t i = 0; i < drawn; ++i) before += x[static_cast<size_t>(i)];
      const long double slack = total * static_cast<long double>(n) * 0x1p-53L;
      EXPECT_LE(before, u * total + slack) << n << ", " << u;
      EXPECT_GT(before + x[static_cast<size_t>(drawn)], u * total - slack) << n << ", " << u;
    }
  }
}

TEST(RowMath, DrawsTheOnlyNumberThatIsThere) {
  for (const int64_t n : kLengths)
    for (const int64_t only : {int64_t{0}, n / 2, n - 1}) {
      std::vector<float> x(static_cast<size_t>(n));
      x[static_cast<size_t>(only)] = 0x1p-100f;
      for (const float u : {0.0f, 0.5f, 0x1.fffffep-1f}) EXPECT_EQ(row_draw(x.data(), n, u), only);
    }
}

}  // namespace

#include "kernels/ops/sampling.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tests/support/tensor_buffer.h"

namespace {

using kernels::DType;
using kernels::ShapeError;
using support::TensorBuffer;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

TensorBuffer row_of(DType dtype, const std::vector<double>& values) {
  TensorBuffer buffer(dtype, {1, static_cast<int64_t>(values.size())});
  buffer.set(values);
  return buffer;
}

int argmax_of(const TensorBuffer& logits) {
  TensorBuffer token(DType::i32, {1});
  kernels::argmax({}, logits, token);
  return static_cast<int>(token.values()[0]);
}

std::vector<double> top_k_of(const TensorBuffer& logits, int64_t k) {
  TensorBuffer indices(DType::i32, {logits.tensor().rows(), k});
  kernels::top_k({}, logits, indices);
  return indices.values();
}

// Every position of the largest value, in rows that end inside and at the end of a vector; its second
// occurrence is never chosen.
TEST(Argmax, SmallestIndexOfTheLargest) {
  for (DType dtype : {DType::f16, DType::bf16, DType::f32, DType::f64})
    for (size_t n : {1, 7, 32, 45})
      for (size_t place = 0; place < n; ++place) {
        std::vector<double> values(n);
        for (size_t i = 0; i < n; ++i) values[i] = -3.0 - static_cast<double>(i % 5);
        values[place] = values[n - 1] = -1;
        EXPECT_EQ(argmax_of(row_of(dtype, values)), static_cast<int>(place));
      }
}

TEST(Argmax, NonFiniteLogits) {
  const double nan = std::nan("");
  for (DType dtype : {DType::f16, DType::f32}) {
    EXPECT_EQ(argmax_of(row_of(dtype, std::vector<double>(37, nan))), 0);
    EXPECT_EQ(argmax_of(row_of(dtype, std::vector<double>(37, -kInfinity))), 0);
    EXPECT_EQ(argmax_of(row_of(dtype, {nan, -kInfinity, nan})), 1);
    EXPECT_EQ(argmax_of(row_of(dtype, {nan, -5, 2, nan})), 2);
    EXPECT_EQ(argmax_of(row_of(dtype, {0, 60000, kInfinity, 1})), 2);
  }
}

TEST(TopK, MatchesAStableSort) {
  for (DType dtype : {DType::f16, DType::f32})
    for (int64_t n : {1, 5, 16, 17, 64, 333})
      for (int64_t k : {int64_t{1}, int64_t{2}, int64_t{10}, n}) {
        if (k > n) continue;
        auto values = support::normal_values(static_cast<size_t>(3 * n), static_cast<uint64_t>(n * 100 + k));
        for (double& v : values) v = std::round(v * 4) / 4;  // many ties
        TensorBuffer logits(dtype, {3, n}, {}, 2);
        logits.set(values);
        const auto given = top_k_of(logits, k);
        for (int64_t r = 0; r < 3; ++r) {
          std::vector<int64_t> order(static_cast<size_t>(n));
          std::iota(order.begin(), order.end(), 0);
          std::stable_sort(order.begin(), order.end(),
                           [&](int64_t a, int64_t b) { return values[r * n + a] > values[r * n + b]; });
          for (int64_t j = 0; j < k; ++j)
            ASSERT_EQ(given[r * k + j], static_cast<double>(order[j])) << n << " " << k;
        }
      }
}

TEST(TopK, AlwaysDistinctValidIndices) {
  const double nan = std::nan("");
  EXPECT_EQ(top_k_of(row_of(DType::f32, {nan, nan, nan, nan}), 3), (std::vector<double>{0, 1, 2}));
  EXPECT_EQ(top_k_of(row_of(DType::f32, {nan, -kInfinity, nan, 4, nan, 5}), 4),
            (std::vector<double>{5, 3, 0, 1}));
  EXPECT_EQ(top_k_of(row_of(DType::f16, std::vector<double>(20, -kInfinity)), 2),
            (std::vector<double>{0, 1}));
}

TEST(Probabilities, MatchFp64AndSumToOne) {
  const auto values = support::normal_values(501, 9, 3);
  for (float temperature : {0.25f, 1.0f, 2.0f}) {
    TensorBuffer p(DType::f32, {1, 501});
    kernels::probabilities({}, row_of(DType::f32, values), temperature, p);
    const auto given = p.values();
    double sum = 0;
    for (double v : values) sum += std::exp(v / temperature);
    // The exponent reaches 80: its fp32 rounding is 80 * 2^-24, and 501 additions add as much again.
    for (size_t i = 0; i < values.size(); ++i) {
      const double expected = std::exp(values[i] / temperature) / sum;
      EXPECT_NEAR(given[i], expected, expected * 1e-4 + 1e-37);
    }
    EXPECT_NEAR(std::accumulate(given.begin(), given.end(), 0.0), 1, 501 * 0x1p-24);
  }
}

TEST(Probabilities, ExtremesAndColdSampling) {
  TensorBuffer p(DType::f32, {1, 4});
  kernels::probabilities({}, row_of(DType::f16, {60000, -60000, -kInfinity, 60000}), 1.0f, p);
  EXPECT_EQ(p.values(), (std::vector<double>{0.5, 0, 0, 0.5}));
  // Of the last one, a denormal number, the reciprocal is infinite.
  for (const float temperature : {1e-3f, 1e-20f, 1e-40f}) {
    p.poison();
    kernels::probabilities({}, row_of(DType::f32, {1, 3, 2, -4}), temperature, p);
    EXPECT_EQ(p.values(), (std::vector<double>{0, 1, 0, 0})) << temperature;
  }
}

TEST(Sampling, WrongArgumentsAreNamed) {
  const auto logits = row_of(DType::f16, {1, 2, 3});
  TensorBuffer p(DType::f32, {1, 3}), half(DType::f16, {1, 3}), tokens(DType::i32, {2}),
      many(DType::i32, {1, 4});
  EXPECT_THROW(kernels::probabilities({}, logits, 0.0f, p), ShapeError);
  EXPECT_THROW(kernels::probabilities({}, logits, 1.0f, half), ShapeError);
  EXPECT_THROW(kernels::argmax({}, logits, tokens), ShapeError);
  EXPECT_THROW(kernels::top_k({}, logits, many), ShapeError);
}

}  // namespace

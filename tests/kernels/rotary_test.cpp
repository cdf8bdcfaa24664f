#include "kernels/ops/rotary.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/tensor_buffer.h"

namespace {

using kernels::DType;
using kernels::ShapeError;
using support::TensorBuffer;

TensorBuffer positions_of(std::vector<double> values) {
  TensorBuffer buffer(DType::i32, {static_cast<int64_t>(values.size())});
  buffer.set(values);
  return buffer;
}

// Written out in fp64, pair by pair.
std::vector<double> rotated(const std::vector<double>& x, int64_t position, double theta, int64_t width) {
  std::vector<double> y(x.size());
  for (size_t h = 0; h < x.size(); h += static_cast<size_t>(width))
    for (int64_t d = 0; d < width / 2; ++d) {
      const double angle = static_cast<double>(position) *
                           std::pow(theta, -2.0 * static_cast<double>(d) / static_cast<double>(width));
      const size_t i = h + static_cast<size_t>(d), j = i + static_cast<size_t>(width / 2);
      y[i] = x[i] * std::cos(angle) - x[j] * std::sin(angle);
      y[j] = x[i] * std::sin(angle) + x[j] * std::cos(angle);
    }
  return y;
}

TEST(Rotary, MatchesTheFormulaAlsoFarOut) {
  constexpr int64_t kHeads = 3, kWidth = 20;
  // The last ones lie beyond every table made before.
  const std::vector<double> positions = {0, 1, 77, 2047, 100003};
  TensorBuffer x(DType::f64, {5, kHeads, kWidth});
  x.fill_normal(1);
  const auto before = x.values();
  kernels::rotary({}, x, positions_of(positions), 10000.0f);
  const auto after = x.values();
  for (size_t i = 0; i < positions.size(); ++i) {
    const size_t size = kHeads * kWidth;
    const std::vector<double> row(before.begin() + i * size, before.begin() + (i + 1) * size);
    const auto expected = rotated(row, static_cast<int64_t>(positions[i]), 10000.0, kWidth);
    // An angle of 1e5 carries 1e5 * 2^-53 = 1e-11 of rounding.
    for (size_t c = 0; c < size; ++c) EXPECT_NEAR(after[i * size + c], expected[c], 1e-10);
  }
}

// What a rotary embedding is for: a product of rotated rows depends on the distance alone.
TEST(Rotary, ProductsDependOnDistance) {
  constexpr int64_t kWidth = 32;
  TensorBuffer q(DType::f64, {4, 1, kWidth}), k(DType::f64, {4, 1, kWidth});
  std::vector<double> same_q, same_k;
  for (int row = 0; row < 4; ++row)
    for (int64_t d = 0; d < kWidth; ++d) {
      same_q.push_back(std::sin(1.0 + static_cast<double>(d)));
      same_k.push_back(std::cos(3.0 * static_cast<double>(d)));
    }
  q.set(same_q);
  k.set(same_k);
  kernels::rotary({}, q, positions_of({9, 109, 1009, 10}), 10000.0f);
  kernels::rotary({}, k, positions_of({2, 102, 1002, 2}), 10000.0f);
  std::vector<double> products(4);
  for (int row = 0; row < 4; ++row)
    for (int64_t d = 0; d < kWidth; ++d)
      products[row] += q.values()[row * kWidth + d] * k.values()[row * kWidth + d];
  EXPECT_NEAR(products[1], products[0], 1e-11);
  EXPECT_NEAR(products[2], products[0], 1e-11);
  EXPECT_GT(std::abs(products[3] - products[0]), 1e-3);
}

// q is a block of columns of one (N, 3 C) matrix: the columns beside it stay untouched.
TEST(Rotary, StridedRowsLeaveTheirNeighboursAlone) {
  constexpr int64_t kRows = 4, kHeads = 2, kWidth = 10, kBlock = kHeads * kWidth;
  for (DType dtype : {DType::f16, DType::bf16, DType::f32}) {
    TensorBuffer matrix(dtype, {kRows, 3 * kBlock}), dense(dtype, {kRows, kHeads, kWidth});
    matrix.fill_normal(5);
    const auto before = matrix.values();
    std::vector<double> block;
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t c = 0; c < kBlock; ++c) block.push_back(before[i * 3 * kBlock + kBlock + c]);
    dense.set(block);
    const auto positions = positions_of({3, 1, 4, 1});
    kernels::rotary({}, dense, positions, 100.0f);
    kernels::rotary({}, matrix.tensor().columns(kBlock, kBlock).view({kRows, kHeads, kWidth}), positions,
                    100.0f);
    const auto after = matrix.values(), expected = dense.values();
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t c = 0; c < 3 * kBlock; ++c) {
        const bool inside = c >= kBlock && c < 2 * kBlock;
        EXPECT_EQ(after[i * 3 * kBlock + c],
                  inside ? expected[i * kBlock + c - kBlock] : before[i * 3 * kBlock + c]);
      }
  }
}

TEST(Rotary, WrongArgumentsAreNamed) {
  TensorBuffer x(DType::f32, {1, 1, 4}), odd(DType::f32, {1, 1, 3}), flat(DType::f32, {1, 4});
  x.fill_normal(1);
  EXPECT_THROW(kernels::rotary({}, odd, positions_of({0}), 10000.0f), ShapeError);
  EXPECT_THROW(kernels::rotary({}, flat, positions_of({0}), 10000.0f), ShapeError);
  EXPECT_THROW(kernels::rotary({}, x, positions_of({0, 1}), 10000.0f), ShapeError);
  EXPECT_THROW(kernels::rotary({}, x, positions_of({-1}), 10000.0f), ShapeError);
  EXPECT_THROW(kernels::rotary({}, x, positions_of({0}), 0.0f), ShapeError);
  EXPECT_THROW(kernels::rotary({}, x, positions_of({0}), 10000.0f, 2), ShapeError);
}

}  // namespace

#include "kernels/core/tensor.h"

#include <gtest/gtest.h>

#include <vector>

namespace {

using kernels::DType;
using kernels::rows_aligned;
using kernels::Tensor;

TEST(RowsAligned, EveryRowBeginsAtAMultiple) {
  alignas(64) static char memory[1 << 12];
  EXPECT_TRUE(rows_aligned(Tensor(memory, DType::f16, {4, 24}), 16));
  EXPECT_FALSE(rows_aligned(Tensor(memory, DType::f16, {4, 20}), 16));
  EXPECT_TRUE(rows_aligned(Tensor(memory, DType::f16, {1, 20}), 16));
  EXPECT_FALSE(rows_aligned(Tensor(memory + 2, DType::f16, {4, 24}), 16));
  EXPECT_TRUE(rows_aligned(Tensor(memory, DType::f16, {4, 24}).columns(8, 8), 16));
  EXPECT_FALSE(rows_aligned(Tensor(memory, DType::f16, {4, 24}).columns(4, 8), 16));
}

// A gain or a bias: were its elements taken for rows, every norm would read one element at a time.
TEST(RowsAligned, AVectorIsOneRow) {
  alignas(64) static char memory[1 << 12];
  EXPECT_TRUE(rows_aligned(Tensor(memory, DType::f16, {768}), 16));
  EXPECT_FALSE(rows_aligned(Tensor(memory + 8, DType::f16, {768}), 16));
}

}  // namespace

#include "kernels/ops/embedding.h"

#include <gtest/gtest.h>

#include "tests/support/tensor_buffer.h"

namespace {

using kernels::DType;
using kernels::ShapeError;
using support::buffer_of;
using support::TensorBuffer;

TEST(Embedding, LooksUpAddsAndLeavesNegativeTokensZero) {
  const auto table = buffer_of(DType::f16, {3, 2}, {1, 2, 3, 4, 5, 6});
  const auto learned = buffer_of(DType::f16, {2, 2}, {0.25, 0.5, -1, -2});
  const auto tokens = buffer_of(DType::i32, {4}, {2, -1, 0, 2}),
             positions = buffer_of(DType::i32, {4}, {0, 1, 1, 1});
  TensorBuffer y(DType::f16, {4, 2});
  kernels::embedding({}, tokens, table, {}, {}, y);
  EXPECT_EQ(y.values(), (std::vector<double>{5, 6, 0, 0, 1, 2, 5, 6}));
  y.poison();
  kernels::embedding({}, tokens, table, positions, learned, y);
  EXPECT_EQ(y.values(), (std::vector<double>{5.25, 6.5, 0, 0, 0, 0, 4, 4}));
}

// The order of the sum is the order of the rows: 1e8 - 1e8 + 1 is 1 in fp32, any other order gives 0 or 1e8.
TEST(Embedding, GradientsAreSummedInOrder) {
  const auto dy = buffer_of(DType::f32, {4, 1}, {1e8, -1e8, 7, 1});
  const auto tokens = buffer_of(DType::i32, {4}, {1, 1, -1, 1}),
             positions = buffer_of(DType::i32, {4}, {0, 0, 0, 0});
  auto dtable = buffer_of(DType::f32, {2, 1}, {3, 0}), dlearned = buffer_of(DType::f32, {1, 1}, {0});
  kernels::embedding_backward({}, dy, tokens, dtable, positions, dlearned);
  EXPECT_EQ(dtable.values(), (std::vector<double>{3, 1}));
  EXPECT_EQ(dlearned.values(), (std::vector<double>{1}));
}

TEST(Embedding, IndicesBeyondTheTableAreNamed) {
  const auto table = buffer_of(DType::f32, {3, 2}, {1, 2, 3, 4, 5, 6});
  const auto tokens = buffer_of(DType::i32, {2}, {0, 3}), fine = buffer_of(DType::i32, {2}, {0, 1});
  TensorBuffer y(DType::f32, {2, 2}), narrow(DType::f32, {2, 3});
  try {
    kernels::embedding({}, tokens, table, {}, {}, y);
    FAIL() << "token 3 of 3 was accepted";
  } catch (const ShapeError& e) {
    EXPECT_STREQ(e.what(), "embedding: token 3 of row 1 is beyond the table's 3 rows");
  }
  EXPECT_THROW(kernels::embedding({}, fine, table, tokens, table, y), ShapeError);
  EXPECT_THROW(kernels::embedding_backward({}, y, tokens, table, {}, {}), ShapeError);
  EXPECT_THROW(kernels::embedding({}, fine, table, {}, {}, narrow), ShapeError);
}

}  // namespace

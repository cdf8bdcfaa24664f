// Sampling on a GPU, beyond the table of cases: the CPU's choices where logits are equal or not numbers, at
// widths that one block and a cluster of blocks read, and rows that do not depend on their neighbours.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/ops/sampling.h"
#include "tests/support/tensor_buffer.h"

namespace {

using kernels::Context;
using kernels::Device;
using kernels::DType;
using kernels::Tensor;
using support::TensorBuffer;

constexpr Device kGpu{Device::Kind::cuda, 0};

class CudaSampling : public testing::Test {
 protected:
  void SetUp() override {
    if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU";
  }
};

std::vector<double> argmax_on(Device device, DType dtype, int64_t rows, const std::vector<double>& values) {
  TensorBuffer logits(dtype, {rows, static_cast<int64_t>(values.size()) / rows}, device, 3),
      tokens(DType::i32, {rows}, device);
  logits.set(values);
  kernels::argmax({.device = device, .stream = {}}, logits, tokens);
  return tokens.values();
}

std::vector<double> top_k_on(Device device, DType dtype, int64_t rows, const std::vector<double>& values,
                             int64_t k) {
  TensorBuffer logits(dtype, {rows, static_cast<int64_t>(values.size()) / rows}, device, 3),
      indices(DType::i32, {rows, k}, device, 1);
  logits.set(values);
  kernels::top_k({.device = device, .stream = {}}, logits, indices);
  return indices.values();
}

// Values with many ties, both zeros, infinities and NaN.
std::vector<double> awkward_values(int64_t count, uint64_t seed) {
  auto values = support::normal_values(static_cast<size_t>(count), seed);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = std::round(values[i] * 4) / 4;
    if (i % 11 == 3) values[i] = -std::numeric_limits<double>::infinity();
    if (i % 13 == 5) values[i] = std::nan("");
    if (i % 17 == 6) values[i] = -0.0;
  }
  return values;
}

TEST_F(CudaSampling, ChoosesAsTheCpuDoes) {
  for (DType dtype : {DType::f16, DType::bf16, DType::f32})
    for (int64_t columns : {1, 31, 333, 5003, 50304}) {
      const auto values = awkward_values(3 * columns, static_cast<uint64_t>(columns));
      EXPECT_EQ(argmax_on(kGpu, dtype, 3, values), argmax_on({}, dtype, 3, values)) << columns;
      for (int64_t k : {1, 10, 32, 70, 333}) {
        if (k > columns || k * columns > 4'000'000) continue;  // minutes under a race detector
        EXPECT_EQ(top_k_on(kGpu, dtype, 3, values, k), top_k_on({}, dtype, 3, values, k))
            << k << " of " << columns << " in " << name_of(dtype);
      }
    }
}

TEST_F(CudaSampling, NothingButNaN) {
  for (int64_t columns : {5, 5000}) {
    const std::vector<double> values(static_cast<size_t>(columns), std::nan(""));
    EXPECT_EQ(argmax_on(kGpu, DType::f16, 1, values), std::vector<double>{0});
    EXPECT_EQ(top_k_on(kGpu, DType::f32, 1, values, 3), (std::vector<double>{0, 1, 2}));
  }
}

TEST_F(CudaSampling, ARowDoesNotDependOnItsNeighbours) {
  constexpr int64_t kRows = 64, kColumns = 9001;
  TensorBuffer logits(DType::f16, {kRows, kColumns}, kGpu);
  logits.fill_normal(1, 3);
  const auto rows_of = [&](int64_t first, int64_t count) {
    TensorBuffer p(DType::f32, {count, kColumns}, kGpu);
    kernels::probabilities({.device = kGpu, .stream = {}}, logits.tensor().slice(first, count), 0.7f, p);
    return p.bytes();
  };
  const auto all = rows_of(0, kRows);
  const size_t row_bytes = all.size() / kRows;
  for (int64_t n : {1, 2, 3, 7, 32, 63}) {
    const int64_t first = (n * 7) % (kRows - n + 1);
    const auto rows = rows_of(first, n);
    EXPECT_TRUE(std::equal(rows.begin(), rows.end(), all.begin() + first * row_bytes)) << n << " rows";
  }
}

}  // namespace

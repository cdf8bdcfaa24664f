// The operations of the decode path compute every row alone: a row's bits are the same whichever rows stand
// beside it, wherever it lies in memory and however many threads there are. Greedy speculative decoding is
// lossless because of this.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>

#include "kernels/core/parallel.h"
#include "kernels/ops/activation.h"
#include "kernels/ops/embedding.h"
#include "kernels/ops/norm.h"
#include "kernels/ops/rotary.h"
#include "kernels/ops/sampling.h"
#include "tests/support/instruction_sets.h"
#include "tests/support/tensor_buffer.h"

namespace {

using kernels::Context;
using kernels::DType;
using kernels::Tensor;
using support::TensorBuffer;

constexpr int64_t kRows = 64;
// Odd, so that rows start at every alignment; wide enough that 64 rows are shared out over threads.
constexpr int64_t kColumns = 517;

// Runs an operation on rows [begin, begin + count) and returns its output for those rows.
using RowsFn = std::function<Tensor(int64_t begin, int64_t count)>;

std::vector<std::vector<char>> row_bytes(const Tensor& t) {
  std::vector<std::vector<char>> rows;
  const size_t size = static_cast<size_t>(t.cols()) * size_of(t.dtype);
  for (int64_t i = 0; i < t.rows(); ++i) {
    const auto* begin = static_cast<const char*>(t.slice(i, 1).data);
    rows.emplace_back(begin, begin + size);
  }
  return rows;
}

void expect_row_invariant(const RowsFn& run) {
  support::with_each_instruction_set([&](const char* instructions) {
    kernels::set_threads(1);
    const auto all = row_bytes(run(0, kRows));
    for (int threads : {1, 3}) {
      kernels::set_threads(threads);
      for (int64_t n = 1; n <= kRows; ++n)
        for (int64_t begin : {int64_t{0}, kRows - n, (kRows - n) / 3}) {
          const auto rows = row_bytes(run(begin, n));
          for (int64_t i = 0; i < n; ++i)
            ASSERT_TRUE(rows[i] == all[begin + i]) << "row " << begin + i << " among " << n << " rows, "
                                                   << threads << " threads, " << instructions;
        }
    }
    kernels::set_threads(0);
  });
}

TensorBuffer normal_buffer(DType dtype, kernels::Shape shape, uint64_t seed) {
  TensorBuffer buffer(dtype, shape);
  buffer.fill_normal(seed, 2);
  return buffer;
}

TensorBuffer integers(int64_t count, int64_t modulus) {
  TensorBuffer buffer(DType::i32, {count});
  std::vector<double> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) values[static_cast<size_t>(i)] = static_cast<double>(i * 29 % modulus);
  buffer.set(values);
  return buffer;
}

class RowInvariance : public testing::TestWithParam<DType> {
 protected:
  TensorBuffer input(uint64_t seed, int64_t columns = kColumns) const {
    return normal_buffer(GetParam(), {kRows, columns}, seed);
  }
  const Context ctx_;
};

TEST_P(RowInvariance, Norm) {
  const auto x = input(1), gain = normal_buffer(GetParam(), {kColumns}, 2),
             bias = normal_buffer(GetParam(), {kColumns}, 3);
  TensorBuffer y(GetParam(), {kRows, kColumns});
  for (auto kind : {kernels::NormKind::rms, kernels::NormKind::layer})
    expect_row_invariant([&](int64_t begin, int64_t count) {
      y.poison();
      const Tensor out = y.tensor().slice(begin, count);
      kernels::norm(ctx_, {.kind = kind}, x.tensor().slice(begin, count), gain, bias, out, {});
      return out;
    });
}

TEST_P(RowInvariance, ResidualNorm) {
  const auto x = input(1), branch = input(4), gain = normal_buffer(GetParam(), {kColumns}, 2);
  TensorBuffer y(GetParam(), {kRows, kColumns}), sum(GetParam(), {kRows, kColumns});
  expect_row_invariant([&](int64_t begin, int64_t count) {
    y.poison();
    const Tensor out = y.tensor().slice(begin, count);
    kernels::residual_norm(ctx_, {}, x.tensor().slice(begin, count), branch.tensor().slice(begin, count),
                           gain, {}, sum.tensor().slice(begin, count), out, {});
    return out;
  });
}

TEST_P(RowInvariance, Rotary) {
  constexpr int64_t kHeads = 11, kWidth = 46;
  const auto x = input(1, kHeads * kWidth), positions = integers(kRows, 97);
  TensorBuffer y(GetParam(), {kRows, kHeads, kWidth});
  expect_row_invariant([&](int64_t begin, int64_t count) {
    support::copy(x.tensor().view({kRows, kHeads, kWidth}), y);
    const Tensor out = y.tensor().slice(begin, count);
    kernels::rotary(ctx_, out, positions.tensor().slice(begin, count), 10000.0f);
    return out;
  });
}

TEST_P(RowInvariance, Activations) {
  const auto wide = input(1, 2 * kColumns), a = input(2), b = input(3);
  TensorBuffer y(GetParam(), {kRows, kColumns});
  const auto rows = [](const TensorBuffer& t, int64_t begin, int64_t n) {
    return t.tensor().slice(begin, n);
  };
  const std::function<void(int64_t, int64_t, Tensor)> operations[] = {
      [&](int64_t i, int64_t n, Tensor out) { kernels::swiglu(ctx_, rows(wide, i, n), out); },
      [&](int64_t i, int64_t n, Tensor out) { kernels::gelu(ctx_, rows(a, i, n), out); },
      [&](int64_t i, int64_t n, Tensor out) { kernels::silu_add(ctx_, rows(a, i, n), rows(b, i, n), out); },
      [&](int64_t i, int64_t n, Tensor out) { kernels::add(ctx_, rows(a, i, n), rows(b, i, n), out); }};
  for (const auto& operation : operations)
    expect_row_invariant([&](int64_t begin, int64_t count) {
      y.poison();
      const Tensor out = rows(y, begin, count);
      operation(begin, count, out);
      return out;
    });
}

TEST_P(RowInvariance, Embedding) {
  const auto table = normal_buffer(GetParam(), {19, kColumns}, 1),
             learned = normal_buffer(GetParam(), {97, kColumns}, 2);
  const auto tokens = integers(kRows, 19), positions = integers(kRows, 97);
  TensorBuffer y(GetParam(), {kRows, kColumns});
  expect_row_invariant([&](int64_t begin, int64_t count) {
    y.poison();
    const Tensor out = y.tensor().slice(begin, count);
    kernels::embedding(ctx_, tokens.tensor().slice(begin, count), table,
                       positions.tensor().slice(begin, count), learned, out);
    return out;
  });
}

TEST_P(RowInvariance, Sampling) {
  const auto logits = input(1);
  TensorBuffer tokens(DType::i32, {kRows}), indices(DType::i32, {kRows, 9});
  TensorBuffer p(main_dtype(GetParam()), {kRows, kColumns});
  const std::function<Tensor(const Tensor&, int64_t, int64_t)> operations[] = {
      [&](const Tensor& x, int64_t begin, int64_t count) {
        const Tensor out = tokens.tensor().slice(begin, count);
        return kernels::argmax(ctx_, x, out), out;
      },
      [&](const Tensor& x, int64_t begin, int64_t count) {
        const Tensor out = p.tensor().slice(begin, count);
        return kernels::probabilities(ctx_, x, 0.7f, out), out;
      },
      [&](const Tensor& x, int64_t begin, int64_t count) {
        const Tensor out = indices.tensor().slice(begin, count);
        return kernels::top_k(ctx_, x, out), out;
      }};
  for (const auto& operation : operations)
    expect_row_invariant([&](int64_t begin, int64_t count) {
      for (TensorBuffer* buffer : {&tokens, &p, &indices}) buffer->poison();
      return operation(logits.tensor().slice(begin, count), begin, count);
    });
}

INSTANTIATE_TEST_SUITE_P(Types, RowInvariance, testing::Values(DType::f16, DType::bf16, DType::f32),
                         [](const auto& info) { return std::string(name_of(info.param)); });

}  // namespace

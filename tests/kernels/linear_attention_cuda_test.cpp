// Linear attention on a GPU beyond the table of operation cases: decoding, and what only long sequences show.
#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "tests/kernels/attention_decoder.h"
#include "tests/support/rehearsed.h"

namespace {

using namespace decoding;

constexpr kernels::Device kCuda{kernels::Device::Kind::cuda, 0};

class CudaLinearDecode : public testing::TestWithParam<Kind> {
 protected:
  void SetUp() override {
    if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU";
  }
  const Maker maker_ = [](Sizes s, DType dtype, size_t sequences) {
    return Decoder(GetParam(), s, dtype, sequences, kCuda);
  };
};
INSTANTIATE_TEST_SUITE_P(Kinds, CudaLinearDecode, testing::Values(Kind::linear, Kind::linear_plain),
                         [](const auto& info) {
                           return info.param == Kind::linear ? "normalised" : "plain";
                         });

// fp32 sums over the rows and the width.
TEST_P(CudaLinearDecode, PlainDecodingIsTheDefinition) {
  const int count = 130;
  for (Sizes s : {Sizes{4, 2, 16}, Sizes{2, 1, 21}, Sizes{2, 2, 128}})
    for (DType dtype : {DType::f32, DType::f16, DType::bf16})
      expect_definition(maker_, s, dtype, count, {.sums = static_cast<double>(2 * count + s.width)});
}

TEST_P(CudaLinearDecode, PrefillInChainsEqualsOneByOneBitForBit) {
  expect_chains_equal_plain(maker_, {4, 2, 32}, DType::f16, 140, 2);
}

TEST_P(CudaLinearDecode, TreeNodesEqualPlainDecodingBitForBit) {
  expect_trees_equal_plain(maker_, {4, 2, 64}, DType::f16, {0, 47, 63, 100}, 6, 20);
}

TEST_P(CudaLinearDecode, SequencesDoNotTouchEachOther) {
  expect_sequences_apart(maker_, {4, 1, 64}, DType::bf16);
}

// A step and its commit recorded once and launched again and again: lengths and accepted rows are read on the
// device, the fold included.
TEST(CudaLinearGraph, ADecodingStepIsRecordedOnce) {
  if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU";
  const int64_t width = 64;
  const auto zeros = [](DType dtype, kernels::Shape shape) {
    return support::buffer_of(dtype, shape, std::vector<double>(static_cast<size_t>(shape.numel())), kCuda);
  };
  const TensorBuffer sum = zeros(DType::f32, {1, 1, width, width}), z = zeros(DType::f32, {1, 1, width}),
                     recent_k(DType::f32, {1, 2 * kFold, 1, width}, kCuda),
                     recent_v(DType::f16, {1, 2 * kFold, 1, width}, kCuda);
  kernels::LinearAttentionState state{sum, z, recent_k, recent_v};
  expect_recorded_equals_eager(
      Decoder(Kind::linear, {2, 1, width}, DType::f16, 1, kCuda), 2 * static_cast<int>(kFold) + 5,
      [&](const kernels::Context& ctx, const StepTensors& t) {
        kernels::linear_attention_decode(ctx, {}, t.q, t.k, t.v, t.rows(), state, t.o);
        kernels::linear_attention_commit(ctx, t.path(), state);
      });
}

using Gradients = std::array<std::vector<double>, 3>;

TensorBuffer fp16_normal(kernels::Shape shape, uint64_t seed) {
  TensorBuffer x(DType::f16, shape);
  x.fill_normal(seed);
  return x;
}

// One sequence.
struct Heads {
  int64_t rows, of_queries, of_keys, width;
  kernels::Shape queries() const { return {rows, of_queries, width}; }
  kernels::Shape keys() const { return {rows, of_keys, width}; }
};

// dq, dk and dv for a given do; inputs are the same fp16 numbers in every type.
Gradients gradients(DType type, kernels::Device device, bool normalise, const Heads& s,
                    const std::vector<double>& dout_values) {
  const DType out = normalise ? type : main_dtype(type);
  TensorBuffer x[3], d[3], o(out, s.queries(), device), dout(out, s.queries(), device),
      denominator(main_dtype(type), {s.rows, s.of_queries}, device), boundaries(DType::i32, {2}, device);
  for (uint64_t i = 0; i < 3; ++i) {
    const kernels::Shape shape = i == 0 ? s.queries() : s.keys();
    x[i] = TensorBuffer(type, shape, device);
    d[i] = TensorBuffer(type, shape, device);
    x[i].set(fp16_normal(shape, i + 1).values());
  }
  dout.set(dout_values);
  boundaries.set(std::vector<double>{0, static_cast<double>(s.rows)});
  support::run_rehearsed(device, {}, [&](const kernels::Context& ctx) {
    const kernels::LinearAttentionParams params{.normalise = normalise};
    kernels::linear_attention(ctx, params, x[0], x[1], x[2], boundaries, o, denominator);
    kernels::linear_attention_backward(ctx, params, dout, x[0], x[1], x[2], o, denominator, boundaries, d[0],
                                       d[1], d[2]);
  });
  return {d[0].values(), d[1].values(), d[2].values()};
}

// Chunks whose rows carry no loss between chunks of small and of large gradients: each keeps its precision,
// whatever scale it is given. Rounded on the way (2^-11 each in fp16): two features, a product, a state and
// the result, and o through do . o; together, against the norm of the exact chunk, below 8 of them.
void expect_gradients_of_any_size(DType type, bool normalise, const Heads& s) {
  constexpr size_t kChunks = 11, kChunk = 64;
  auto dout = fp16_normal(s.queries(), 9).values();
  const auto chunk_of = [&](size_t element, size_t elements) {
    return element * static_cast<size_t>(s.rows) / elements / kChunk;
  };
  for (size_t i = 0; i < dout.size(); ++i) {
    const size_t chunk = chunk_of(i, dout.size());
    dout[i] *= chunk == 2 || chunk == 3 || chunk == 10 ? 0 : chunk % 2 == 0 ? 0x1p-8 : 0x1p-3;
  }
  const Gradients given = gradients(type, kCuda, normalise, s, dout),
                  exact = gradients(DType::f64, {}, normalise, s, dout);
  const double rounding = type == DType::f16 ? 0x1p-11 : 0x1p-8;
  for (size_t x = 0; x < 3; ++x) {
    const size_t elements = exact[x].size();
    std::vector<double> error(kChunks), size(kChunks);
    for (size_t i = 0; i < elements; ++i) {
      ASSERT_TRUE(std::isfinite(given[x][i]));
      error[chunk_of(i, elements)] += std::pow(given[x][i] - exact[x][i], 2);
      size[chunk_of(i, elements)] += std::pow(exact[x][i], 2);
    }
    // What lies below fp16's smallest number, 2^-24, has no precision to keep.
    const double smallest = 0x1p-24 * std::sqrt(static_cast<double>(elements) / kChunks);
    for (size_t chunk = 0; chunk < kChunks; ++chunk)
      EXPECT_LE(std::sqrt(error[chunk]), 8 * rounding * std::sqrt(size[chunk]) + smallest)
          << "dq dk dv"[3 * x + 1] << ", chunk " << chunk << ", width " << s.width << ", heads "
          << s.of_queries << (normalise ? ", normalised" : "");
  }
}

TEST(CudaLinearAttention, GradientsOfAnySizeSideBySide) {
  if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU";
  for (const DType type : {DType::f16, DType::bf16})
    for (const bool normalise : {true, false})
      for (const int64_t width : {64, 128})
        for (const int64_t heads : {1, 2}) {
          SCOPED_TRACE(kernels::name_of(type));
          expect_gradients_of_any_size(type, normalise, {700, heads, 1, width});
        }
}

// An overflow must not vanish on the way. Neighbours within 16 rows before may become not a number as well.
TEST(CudaLinearAttention, NotANumberReachesEveryRowThatSeesIt) {
  if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU";
  const kernels::Shape shape = {90, 1, 64};
  for (int poisoned = 0; poisoned < 3; ++poisoned) {
    TensorBuffer x[3], o(DType::f16, shape, kCuda), denominator(DType::f32, {90, 1}, kCuda),
        boundaries(DType::i32, {3}, kCuda);
    for (uint64_t i = 0; i < 3; ++i) {
      x[i] = TensorBuffer(DType::f16, shape, kCuda);
      x[i].set(fp16_normal(shape, i + 1).values());
    }
    x[poisoned].set(20 * 64 + 3, std::nan(""));
    boundaries.set(std::vector<double>{0, 80, 90});
    support::run_rehearsed(kCuda, {}, [&](const kernels::Context& ctx) {
      kernels::linear_attention(ctx, {}, x[0], x[1], x[2], boundaries, o, denominator);
    });
    const auto y = o.values();
    for (size_t i = 0; i < 90; ++i) {
      const bool sees = poisoned == 0 ? i == 20 : i >= 20 && i < 80;
      if (sees || i < 16 || i >= 80) {
        EXPECT_EQ(std::isnan(y[i * 64 + 3]), sees) << poisoned << ", row " << i;
      }
    }
  }
}

}  // namespace

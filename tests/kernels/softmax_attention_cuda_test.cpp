// Softmax attention on a GPU beyond the table of operation cases: which code runs, graphs, and decoding.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "kernels/core/stream.h"
#include "kernels/cuda/softmax_attention.h"
#include "tests/kernels/attention_decoder.h"

namespace {

using namespace decoding;

constexpr kernels::Device kCuda{kernels::Device::Kind::cuda, 0};

class CudaSoftmax : public testing::Test {
 protected:
  void SetUp() override {
    if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU";
  }
};

// Training attention with its memory, as a trainer holds it: q, k and v are columns of one matrix.
struct Training {
  Sizes s;
  kernels::AttentionHints hints;
  TensorBuffer qkv, dqkv, o, dout, log_sum, boundaries;
  kernels::Arena scratch{"scratch", kCuda};
  kernels::OwnedStream stream{kCuda};
  kernels::Context ctx{.device = kCuda, .stream = stream.get(), .scratch = &scratch, .rehearsal = true};

  Training(Sizes sizes, DType dtype, const std::vector<double>& cu, kernels::AttentionHints given)
      : s(sizes), hints(given) {
    const auto n = static_cast<int64_t>(cu.back());
    const kernels::Shape wide = {n, (s.heads + 2 * s.key_heads) * s.width};
    qkv = TensorBuffer(dtype, wide, kCuda), dqkv = TensorBuffer(dtype, wide, kCuda);
    o = TensorBuffer(dtype, {n, s.heads, s.width}, kCuda),
    dout = TensorBuffer(dtype, o.tensor().shape, kCuda);
    log_sum = TensorBuffer(DType::f32, {n, s.heads}, kCuda);
    boundaries = TensorBuffer(DType::i32, {static_cast<int64_t>(cu.size())}, kCuda);
    qkv.fill_normal(1), dout.fill_normal(2), boundaries.set(cu);
    run();
    scratch.place();
    ctx.rehearsal = false;
  }
  // q (0), k (1) or v (2).
  kernels::Tensor part(const TensorBuffer& x, int which) const {
    const int64_t heads = which == 0 ? s.heads : s.key_heads;
    const int64_t begin = which == 0 ? 0 : s.heads + (which - 1) * s.key_heads;
    return x.tensor().columns(begin * s.width, heads * s.width).view({x.tensor().rows(), heads, s.width});
  }
  kernels::cuda::AttentionCall call(bool backward) const {
    kernels::cuda::AttentionCall c{.q = part(qkv, 0),
                                   .k = part(qkv, 1),
                                   .v = part(qkv, 2),
                                   .o = o,
                                   .log_sum = log_sum,
                                   .cu_seqlens = boundaries,
                                   .hints = hints};
    if (backward) c.dout = dout, c.dq = part(dqkv, 0), c.dk = part(dqkv, 1), c.dv = part(dqkv, 2);
    return c;
  }
  void run() {
    const auto c = call(true);
    kernels::softmax_attention(ctx, c.q, c.k, c.v, c.cu_seqlens, c.o, c.log_sum, hints);
    kernels::softmax_attention_backward(ctx, c.dout, c.q, c.k, c.v, c.o, c.log_sum, c.cu_seqlens, c.dq, c.dk,
                                        c.dv, hints);
  }
  std::vector<std::vector<char>> results() const { return {o.bytes(), log_sum.bytes(), dqkv.bytes()}; }
  void poison() { o.poison(), log_sum.poison(), dqkv.poison(); }
};

const std::vector<double> kRagged = {0, 200, 201, 330};

TEST_F(CudaSoftmax, CommonShapesRunThroughCudnn) {
  if constexpr (kernels::kCudaEnabled)
    for (DType dtype : {DType::f16, DType::bf16})
      for (int64_t width : {8, 40, 64, 128})
        for (const auto& cu : {kRagged, std::vector<double>{0, 256, 512}})
          for (bool backward : {false, true}) {
            const bool uniform = cu != kRagged;
            Training t({4, 2, width}, dtype, cu, {.longest = 256, .uniform = uniform});
            kernels::Context dry = t.ctx;
            dry.rehearsal = true;
            EXPECT_TRUE(kernels::cuda::cudnn_attention(dry, t.call(backward)))
                << name_of(dtype) << ", head size " << width << (uniform ? ", uniform" : ", ragged")
                << (backward ? ", backward" : ", forward");
          }
}

// Recorded, with nothing waited for and no memory taken, and every time the same bits.
TEST_F(CudaSoftmax, RecordedAttentionGivesWhatTheEagerOneGave) {
  for (DType dtype : {DType::f16, DType::f32})
    for (const auto& cu : {kRagged, std::vector<double>{0, 256, 512}}) {
      Training t({4, 2, 64}, dtype, cu, {.longest = 256, .uniform = cu != kRagged});
      t.poison();
      t.run();
      const auto expected = t.results();
      t.poison();
      kernels::Graph graph;
      auto& counters = kernels::device_counters();
      const int64_t waits = counters.synchronizations, allocations = counters.allocations;
      kernels::Graph::begin(t.stream.get());
      t.run();
      graph.end(t.stream.get());
      graph.launch(t.stream.get());
      EXPECT_EQ(counters.synchronizations, waits);
      EXPECT_EQ(counters.allocations, allocations);
      EXPECT_TRUE(t.results() == expected) << name_of(dtype);
      for (int repeat = 0; repeat < 3; ++repeat) {
        t.poison();
        graph.launch(t.stream.get());
        EXPECT_TRUE(t.results() == expected) << name_of(dtype) << ", launch " << repeat;
      }
    }
}

using CudaSoftmaxDecode = CudaSoftmax;

Decoder decoder(Sizes s, DType dtype, size_t sequences) {
  return Decoder(Kind::softmax, s, dtype, sequences, kCuda);
}

// A test of its own for each: under compute-sanitizer a step takes a tenth of a second.
class CudaSoftmaxDecodeSizes : public CudaSoftmax, public testing::WithParamInterface<Sizes> {};

// The tensor cores' head sizes and others, groups smaller and larger than a tile of queries.
INSTANTIATE_TEST_SUITE_P(Of, CudaSoftmaxDecodeSizes,
                         testing::Values(Sizes{4, 2, 64}, Sizes{3, 1, 32}, Sizes{2, 2, 128}, Sizes{20, 1, 64},
                                         Sizes{4, 2, 16}, Sizes{2, 1, 21}),
                         [](const auto& info) {
                           const Sizes& s = info.param;
                           return fmt::format("{}_heads_{}_shared_width_{}", s.heads, s.key_heads, s.width);
                         });

// Probabilities are rounded before they meet the values; fp32 sums over the rows and the width.
TEST_P(CudaSoftmaxDecodeSizes, PlainDecodingIsTheDefinition) {
  const int count = 150;
  const Sizes s = GetParam();
  for (DType dtype : {DType::f32, DType::f16, DType::bf16})
    expect_definition(decoder, s, dtype, count,
                      {.sums = static_cast<double>(4 * (count + s.width)), .factors = 1});
}

TEST_P(CudaSoftmaxDecodeSizes, PrefillInChainsEqualsOneByOneBitForBit) {
  expect_chains_equal_plain(decoder, GetParam(), DType::f16, 200, 2);
}

TEST_P(CudaSoftmaxDecodeSizes, TreeNodesEqualPlainDecodingBitForBit) {
  expect_trees_equal_plain(decoder, GetParam(), DType::bf16, {0, 47, 64, 127}, 5, 10);
}

// More chunks than there are classes of them; and so many tiles that a block takes several classes, one after
// the other, where a single row's are shared out.
struct LongList {
  Sizes sizes;
  DType dtype;
  int count, capacity;
  Decoder operator()(Sizes s, DType type, size_t sequences) const {
    return Decoder(Kind::softmax, s, type, sequences, kCuda, capacity);
  }
};
class CudaSoftmaxDecodeLong : public CudaSoftmax, public testing::WithParamInterface<LongList> {};
constexpr LongList kLongest{{1, 1, 32}, DType::f16, 2120, 2176};

INSTANTIATE_TEST_SUITE_P(Of, CudaSoftmaxDecodeLong,
                         testing::Values(kLongest, LongList{{34, 2, 32}, DType::bf16, 600, 640},
                                         LongList{{17, 1, 128}, DType::bf16, 600, 640}),
                         [](const auto& info) {
                           return fmt::format("{}_rows_heads_{}", info.param.count, info.param.sizes.heads);
                         });

TEST_P(CudaSoftmaxDecodeLong, ListsEqualOneByOneBitForBit) {
  const LongList& p = GetParam();
  expect_chains_equal_plain(p, p.sizes, p.dtype, p.count, 1);
}

// In chains, which give the bits of single tokens: see above.
TEST_F(CudaSoftmaxDecode, TheLongestListIsTheDefinition) {
  const LongList& p = kLongest;
  expect_definition(p, p.sizes, p.dtype, p.count,
                    {.sums = static_cast<double>(4 * (p.count + p.sizes.width)), .factors = 1},
                    kernels::kMaxDecodeRows);
}

TEST_F(CudaSoftmaxDecode, SequencesDoNotTouchEachOther) {
  expect_sequences_apart(decoder, {8, 4, 64}, DType::f16);
}

// A step recorded once and launched again and again: lengths are read on the device.
TEST_F(CudaSoftmaxDecode, AStepIsRecordedOnce) {
  const TensorBuffer cache_k(DType::f16, {1, 256, 1, 64}, kCuda), cache_v(DType::f16, {1, 256, 1, 64}, kCuda);
  expect_recorded_equals_eager(
      decoder({2, 1, 64}, DType::f16, 1), 140, [&](const kernels::Context& ctx, const StepTensors& t) {
        kernels::softmax_attention_decode(ctx, t.q, t.k, t.v, t.rows(), cache_k, cache_v, t.o);
      });
}

}  // namespace

// Softmax attention on a GPU beyond the table of operation cases: which code runs, graphs, and decoding.
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

class CudaSoftmaxDecode : public CudaSoftmax {
 protected:
  Decoder decoder(Sizes s, DType dtype, size_t sequences = 1, int64_t capacity = 256) const {
    return Decoder(Kind::softmax, s, dtype, std::vector<int>(sequences, 0), capacity, kCuda);
  }
};

// The tensor cores' head sizes and others, groups smaller and larger than a tile of queries.
const Sizes kSizes[] = {{4, 2, 64}, {3, 1, 32}, {2, 2, 128}, {20, 1, 64}, {4, 2, 16}, {2, 1, 21}};

// One rounding of the result; one of the probabilities, which moves it by up to u times the largest value;
// fp32 sums over the rows and the width.
TEST_F(CudaSoftmaxDecode, PlainDecodingIsTheDefinition) {
  const int count = 150;
  for (const Sizes& s : kSizes)
    for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      std::vector<double> inputs[3];
      for (Token t = 0; t < count; ++t)
        for (int which = 0; which < 3; ++which) {
          TensorBuffer rounded(dtype, {(which == 0 ? s.heads : s.key_heads) * s.width});
          rounded.set(values_of(t, which, rounded.tensor().numel()));
          const auto x = rounded.values();
          inputs[which].insert(inputs[which].end(), x.begin(), x.end());
        }
      const auto expected = oracle::attention(Kind::softmax, s, inputs[0], inputs[1], inputs[2], {0, count});
      double largest = 0;
      for (double v : inputs[2]) largest = std::max(largest, std::abs(v));
      const double unit = dtype == DType::f16 ? 0x1p-11 : dtype == DType::bf16 ? 0x1p-8 : 0;
      const double sums = 0x1p-24 * static_cast<double>(4 * (count + s.width));
      Decoder one = decoder(s, dtype);
      for (Token t = 0; t < count; ++t) {
        const Row o = one.plain({t});
        for (size_t i = 0; i < o.size(); ++i) {
          const double y = expected[static_cast<size_t>(t) * o.size() + i];
          ASSERT_NEAR(o[i], y, unit * (std::abs(y) + largest) + sums * largest + 0x1p-25)
              << "token " << t << ", " << name_of(dtype) << ", head size " << s.width;
        }
      }
    }
}

TEST_F(CudaSoftmaxDecode, PrefillInChainsEqualsOneByOneBitForBit) {
  std::mt19937 random(1);
  for (const Sizes& s : kSizes) {
    Decoder one = decoder(s, DType::f16), many = one;
    std::vector<Row> expected;
    for (Token t = 0; t < 200; ++t) expected.push_back(one.plain({t}));
    while (many.length(0) < 200) {
      const int begin = many.length(0), most = std::min(64, 200 - begin);
      const int count = begin == 0 ? most : 1 + static_cast<int>(random() % static_cast<unsigned>(most));
      const auto rows = many.step({chain(tokens_from(begin, count))})[0];
      std::vector<int> all;
      for (int i = 0; i < count; ++i) {
        ASSERT_EQ(rows[static_cast<size_t>(i)], expected[static_cast<size_t>(begin + i)])
            << begin << " + " << i << ", head size " << s.width;
        all.push_back(i);
      }
      many.commit({all});
    }
  }
}

// Every node of a tree equals plain decoding of its path, and so does what follows an accepted path; chunks
// shared out over blocks or taken by one.
TEST_F(CudaSoftmaxDecode, TreeNodesEqualPlainDecodingBitForBit) {
  std::mt19937 random(2);
  for (const Sizes& s : kSizes)
    for (int prefix : {0, 47, 64, 127}) {
      Decoder before = decoder(s, DType::bf16);
      before.plain(tokens_from(0, prefix));
      for (int nodes : {2, 31, 64}) {
        const Tree tree = random_tree(random, nodes, nodes, 1000);
        Decoder verify = before;
        verify.working_memory = nodes != 31;
        const auto rows = verify.step({tree})[0];
        for (size_t i = 0; i < tree.size(); i += 1 + tree.size() / 5) {
          Decoder alone = before;
          ASSERT_EQ(rows[i], alone.plain(tokens_of(tree, path_to(tree, static_cast<int>(i)))))
              << "prefix " << prefix << ", node " << i << " of " << tree.size() << ", head size " << s.width;
        }
        const auto path = path_to(tree, static_cast<int>(random() % tree.size()));
        verify.commit({path});
        Decoder plain = before;
        plain.plain(tokens_of(tree, path));
        for (Token t = 2000; t < 2010; ++t) ASSERT_EQ(verify.plain({t}), plain.plain({t})) << t;
      }
    }
}

// 64 sequences of different lengths and numbers of rows, some with none: each as if it were alone.
TEST_F(CudaSoftmaxDecode, SixtyFourSequencesDoNotTouchEachOther) {
  const size_t batch = 64;
  std::mt19937 random(3);
  std::vector<Tree> prefixes, trees;
  std::vector<std::vector<int>> prefix_paths, paths;
  const auto all_of = [](const Tree& tree) {
    return tree.empty() ? std::vector<int>{} : path_to(tree, static_cast<int>(tree.size()) - 1);
  };
  for (size_t b = 0; b < batch; ++b) {
    prefixes.push_back(chain(tokens_from(static_cast<Token>(b) * 1000, static_cast<int>(b) * 7 % 65)));
    const int nodes = b % 5 == 3 ? 0 : 1 + static_cast<int>(b) % 20;
    trees.push_back(nodes == 0 ? Tree{} : random_tree(random, nodes, nodes, 900 + static_cast<Token>(b)));
    prefix_paths.push_back(all_of(prefixes[b]));
    paths.push_back(all_of(trees[b]));
  }
  const Sizes s{8, 4, 64};
  Decoder together = decoder(s, DType::f16, batch);
  together.step(prefixes);
  together.commit(prefix_paths);
  const auto rows = together.step(trees);
  together.commit(paths);
  const auto after = together.step(std::vector<Tree>(batch, chain({77})));
  for (size_t b = 0; b < batch; b += 3) {
    Decoder alone = decoder(s, DType::f16);
    if (!prefixes[b].empty()) {
      alone.step({prefixes[b]});
      alone.commit({prefix_paths[b]});
    }
    if (!trees[b].empty()) {
      EXPECT_EQ(rows[b], alone.step({trees[b]})[0]) << b;
      alone.commit({paths[b]});
    }
    EXPECT_EQ(after[b][0], alone.step({chain({77})})[0][0]) << b;
  }
}

// A step recorded once and launched again and again: lengths are read on the device.
TEST_F(CudaSoftmaxDecode, AStepIsRecordedOnce) {
  const Sizes s{2, 1, 64};
  const int count = 140, capacity = 256;
  Decoder eager = decoder(s, DType::f16, 1, capacity);
  TensorBuffer q(DType::f16, {1, s.heads, s.width}, kCuda), k(DType::f16, {1, s.key_heads, s.width}, kCuda),
      v(DType::f16, k.tensor().shape, kCuda), o(DType::f16, q.tensor().shape, kCuda);
  TensorBuffer first(DType::i32, {2}, kCuda), lengths(DType::i32, {1}, kCuda),
      positions(DType::i32, {1}, kCuda), masks(DType::i64, {1}, kCuda);
  first.set(std::vector<double>{0, 1}), masks.set(0, 1);
  TensorBuffer cache_k(DType::f16, {1, capacity, 1, s.width}, kCuda),
      cache_v(DType::f16, {1, capacity, 1, s.width}, kCuda);
  const kernels::OwnedStream stream(kCuda);
  kernels::Arena scratch("scratch", kCuda);
  kernels::Context ctx{.device = kCuda, .stream = stream.get(), .scratch = &scratch, .rehearsal = true};
  const auto step = [&] {
    kernels::softmax_attention_decode(ctx, q, k, v, {first, lengths, positions, masks}, cache_k, cache_v, o);
  };
  step();
  scratch.place();
  ctx.rehearsal = false;
  kernels::Graph graph;
  kernels::Graph::begin(stream.get());
  step();
  graph.end(stream.get());
  for (Token t = 0; t < count; ++t) {
    q.set(values_of(t, 0, s.heads * s.width));
    k.set(values_of(t, 1, s.width)), v.set(values_of(t, 2, s.width));
    lengths.set(0, t);
    o.poison();
    graph.launch(stream.get());
    kernels::synchronize(kCuda, stream.get());
    ASSERT_EQ(o.values(), eager.plain({t})) << t;
  }
}

}  // namespace

// Linear attention on a GPU beyond the table of operation cases: decoding, and what only long sequences show.
#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "kernels/core/stream.h"
#include "tests/kernels/attention_decoder.h"

namespace {

using namespace decoding;

constexpr kernels::Device kCuda{kernels::Device::Kind::cuda, 0};

class CudaLinearDecode : public testing::TestWithParam<Kind> {
 protected:
  void SetUp() override {
    if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU";
  }
  Decoder decoder(Sizes s, DType dtype, std::vector<int> lengths = {0}) const {
    return Decoder(GetParam(), s, dtype, std::move(lengths), 0, kCuda);
  }
};
INSTANTIATE_TEST_SUITE_P(Kinds, CudaLinearDecode, testing::Values(Kind::linear, Kind::linear_plain),
                         [](const auto& info) {
                           return info.param == Kind::linear ? "normalised" : "plain";
                         });

// One rounding of the result, fp32 sums over the rows and the width.
TEST_P(CudaLinearDecode, PlainDecodingIsTheDefinition) {
  const int count = 130;
  for (Sizes s : {Sizes{4, 2, 16}, Sizes{2, 1, 21}, Sizes{2, 2, 128}})
    for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      std::vector<double> inputs[3];
      for (Token t = 0; t < count; ++t)
        for (int which = 0; which < 3; ++which) {
          TensorBuffer rounded(dtype, {(which == 0 ? s.heads : s.key_heads) * s.width});
          rounded.set(values_of(t, which, rounded.tensor().numel()));
          const auto x = rounded.values();
          inputs[which].insert(inputs[which].end(), x.begin(), x.end());
        }
      const auto expected = oracle::attention(GetParam(), s, inputs[0], inputs[1], inputs[2], {0, count});
      double largest = 0;
      for (double x : expected) largest = std::max(largest, std::abs(x));
      const DType out = GetParam() == Kind::linear_plain ? DType::f32 : dtype;
      const double unit = out == DType::f16 ? 0x1p-11 : out == DType::bf16 ? 0x1p-8 : 0;
      const double sums = 0x1p-24 * static_cast<double>(2 * count + s.width);
      Decoder one = decoder(s, dtype);
      for (Token t = 0; t < count; ++t) {
        const Row o = one.plain({t});
        for (size_t i = 0; i < o.size(); ++i) {
          const double y = expected[static_cast<size_t>(t) * o.size() + i];
          ASSERT_NEAR(o[i], y, unit * std::abs(y) + sums * largest + 0x1p-25) << "token " << t;
        }
      }
    }
}

TEST_P(CudaLinearDecode, PrefillInChainsEqualsOneByOneBitForBit) {
  std::mt19937 random(1);
  Decoder one = decoder({4, 2, 32}, DType::f16), many = one;
  std::vector<Row> expected;
  for (Token t = 0; t < 140; ++t) expected.push_back(one.plain({t}));
  while (many.length(0) < 140) {
    const int begin = many.length(0), most = std::min(many.room(0), 140 - begin);
    const int count = begin == 0 ? most : 1 + static_cast<int>(random() % static_cast<unsigned>(most));
    const auto rows = many.step({chain(tokens_from(begin, count))})[0];
    std::vector<int> all;
    for (int i = 0; i < count; ++i) {
      ASSERT_EQ(rows[static_cast<size_t>(i)], expected[static_cast<size_t>(begin + i)])
          << begin << " + " << i;
      all.push_back(i);
    }
    many.commit({all});
  }
}

// Every node of a tree equals plain decoding of its path, and so does what follows an accepted path.
TEST_P(CudaLinearDecode, TreeNodesEqualPlainDecodingBitForBit) {
  std::mt19937 random(2);
  for (int prefix : {0, 47, 63, 100}) {
    Decoder before = decoder({4, 2, 64}, DType::f16);
    before.plain(tokens_from(0, prefix));
    for (int nodes : {2, 31, 64}) {
      const int depth = std::min(before.room(0), nodes);
      const Tree tree = random_tree(random, depth == 1 ? 1 : nodes, depth, 1000);
      Decoder verify = before;
      const auto rows = verify.step({tree})[0];
      for (size_t i = 0; i < tree.size(); i += 1 + tree.size() / 6) {
        Decoder alone = before;
        ASSERT_EQ(rows[i], alone.plain(tokens_of(tree, path_to(tree, static_cast<int>(i)))))
            << "prefix " << prefix << ", node " << i << " of " << tree.size();
      }
      const auto path = path_to(tree, static_cast<int>(random() % tree.size()));
      verify.commit({path});
      Decoder plain = before;
      plain.plain(tokens_of(tree, path));
      for (Token t = 2000; t < 2020; ++t) ASSERT_EQ(verify.plain({t}), plain.plain({t})) << t;
    }
  }
}

// 64 sequences of different lengths and numbers of rows, some with none: each as if it were alone.
TEST_P(CudaLinearDecode, SixtyFourSequencesDoNotTouchEachOther) {
  const size_t batch = 64;
  std::mt19937 random(3);
  std::vector<Tree> prefixes, trees;
  std::vector<std::vector<int>> prefix_paths, paths;
  const auto all_of = [](const Tree& tree) {
    return tree.empty() ? std::vector<int>{} : path_to(tree, static_cast<int>(tree.size()) - 1);
  };
  for (size_t b = 0; b < batch; ++b) {
    const int length = static_cast<int>(b) * 7 % 65;
    prefixes.push_back(chain(tokens_from(static_cast<Token>(b) * 1000, length)));
    const int room = 64 - length % 64, nodes = b % 5 == 3 ? 0 : room == 1 ? 1 : 1 + static_cast<int>(b) % 20;
    trees.push_back(nodes == 0 ? Tree{} : random_tree(random, nodes, room, 900 + static_cast<Token>(b)));
    prefix_paths.push_back(all_of(prefixes[b]));
    paths.push_back(all_of(trees[b]));
  }
  Decoder together = decoder({4, 1, 64}, DType::bf16, std::vector<int>(batch, 0));
  together.step(prefixes);
  together.commit(prefix_paths);
  const auto rows = together.step(trees);
  together.commit(paths);
  const auto after = together.step(std::vector<Tree>(batch, chain({77})));
  for (size_t b = 0; b < batch; b += 3) {
    Decoder alone = decoder({4, 1, 64}, DType::bf16);
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

// A step and its commit recorded once and launched again and again: lengths and accepted rows are read on the
// device, the fold included.
TEST(CudaLinearGraph, ADecodingStepIsRecordedOnce) {
  if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU";
  const Sizes s{2, 1, 64};
  const int count = 2 * static_cast<int>(kFold) + 5;
  Decoder eager(Kind::linear, s, DType::f16, {0}, 0, kCuda);
  const auto zeros = [](DType dtype, kernels::Shape shape) {
    TensorBuffer x(dtype, shape, kCuda);
    x.set(std::vector<double>(static_cast<size_t>(shape.numel())));
    return x;
  };
  TensorBuffer q(DType::f16, {1, s.heads, s.width}, kCuda), k(DType::f16, {1, s.key_heads, s.width}, kCuda),
      v(DType::f16, k.tensor().shape, kCuda), o(DType::f16, q.tensor().shape, kCuda);
  TensorBuffer first(DType::i32, {2}, kCuda), lengths = zeros(DType::i32, {1}), positions = lengths,
                                              masks(DType::i64, {1}, kCuda);
  TensorBuffer rows = zeros(DType::i32, {1, kernels::kMaxDecodeRows}), counts(DType::i32, {1}, kCuda);
  first.set(std::vector<double>{0, 1}), masks.set(0, 1), counts.set(0, 1);
  TensorBuffer sum = zeros(DType::f32, {1, 1, s.width, s.width}), z = zeros(DType::f32, {1, 1, s.width}),
               recent_k(DType::f32, {1, 2 * kFold, 1, s.width}, kCuda),
               recent_v(DType::f16, {1, 2 * kFold, 1, s.width}, kCuda);
  kernels::LinearAttentionState state{sum, z, recent_k, recent_v};
  const kernels::OwnedStream stream(kCuda);
  const kernels::Context ctx{.device = kCuda, .stream = stream.get()};
  const auto step = [&] {
    kernels::linear_attention_decode(ctx, {}, q, k, v, {first, lengths, positions, masks}, state, o);
    kernels::linear_attention_commit(ctx, {rows, counts, lengths}, state);
  };
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

using Gradients = std::array<std::vector<double>, 3>;

TensorBuffer fp16_normal(kernels::Shape shape, uint64_t seed) {
  TensorBuffer x(DType::f16, shape);
  x.fill_normal(seed);
  return x;
}

// dq, dk and dv of one sequence of one head for a given do; inputs are the same fp16 numbers in every type.
Gradients gradients(DType type, kernels::Device device, bool normalise, kernels::Shape shape,
                    const std::vector<double>& dout_values) {
  const DType out = normalise ? type : main_dtype(type);
  TensorBuffer x[3], d[3], o(out, shape, device), dout(out, shape, device),
      denominator(main_dtype(type), {shape[0], 1}, device), boundaries(DType::i32, {2}, device);
  for (uint64_t i = 0; i < 3; ++i) {
    x[i] = TensorBuffer(type, shape, device);
    d[i] = TensorBuffer(type, shape, device);
    x[i].set(fp16_normal(shape, i + 1).values());
  }
  dout.set(dout_values);
  boundaries.set(std::vector<double>{0, static_cast<double>(shape[0])});
  kernels::Arena scratch("scratch", device);
  kernels::Context ctx{.device = device, .stream = {}, .scratch = &scratch, .rehearsal = true};
  const auto run = [&] {
    const kernels::LinearAttentionParams params{.normalise = normalise};
    kernels::linear_attention(ctx, params, x[0], x[1], x[2], boundaries, o, denominator);
    kernels::linear_attention_backward(ctx, params, dout, x[0], x[1], x[2], o, denominator, boundaries, d[0],
                                       d[1], d[2]);
  };
  run();
  scratch.place();
  ctx.rehearsal = false;
  run();
  return {d[0].values(), d[1].values(), d[2].values()};
}

// Chunks whose rows carry no loss between chunks of small and of large gradients: each keeps its precision,
// whatever scale it is given. Rounded on the way (2^-11 each): two features, a product, a state and the
// result, and o through do . o; together, against the norm of the exact chunk, below 2^-8.
TEST(CudaLinearAttention, GradientsOfAnySizeSideBySide) {
  if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU";
  const kernels::Shape shape = {700, 1, 64};
  auto dout = fp16_normal(shape, 9).values();
  const auto chunk_of = [](size_t element) { return element / (64 * 64); };
  for (size_t i = 0; i < dout.size(); ++i) {
    const size_t chunk = chunk_of(i);
    dout[i] *= chunk == 2 || chunk == 3 || chunk == 10 ? 0 : chunk % 2 == 0 ? 0x1p-8 : 0x1p-3;
  }
  for (const bool normalise : {true, false}) {
    const Gradients given = gradients(DType::f16, kCuda, normalise, shape, dout),
                    exact = gradients(DType::f64, {}, normalise, shape, dout);
    for (size_t x = 0; x < 3; ++x) {
      std::vector<double> error(11), size(11);
      for (size_t i = 0; i < dout.size(); ++i) {
        ASSERT_TRUE(std::isfinite(given[x][i]));
        error[chunk_of(i)] += std::pow(given[x][i] - exact[x][i], 2);
        size[chunk_of(i)] += std::pow(exact[x][i], 2);
      }
      // What lies below fp16's smallest number, 2^-24, has no precision to keep.
      for (size_t chunk = 0; chunk < 11; ++chunk)
        EXPECT_LE(std::sqrt(error[chunk]), 0x1p-8 * std::sqrt(size[chunk]) + 0x1p-24 * 64)
            << "dq dk dv"[3 * x + 1] << ", chunk " << chunk;
    }
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
    kernels::Arena scratch("scratch", kCuda);
    kernels::Context ctx{.device = kCuda, .stream = {}, .scratch = &scratch, .rehearsal = true};
    const auto run = [&] {
      kernels::linear_attention(ctx, {}, x[0], x[1], x[2], boundaries, o, denominator);
    };
    run();
    scratch.place();
    ctx.rehearsal = false;
    run();
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

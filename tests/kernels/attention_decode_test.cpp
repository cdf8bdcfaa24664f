// Decoding: a row's result is the same bits alone, in a chain or in a tree, whatever happened before.
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "kernels/core/parallel.h"
#include "tests/kernels/attention_decoder.h"
#include "tests/support/instruction_sets.h"

namespace {

using namespace decoding;

class DecodeKinds : public testing::TestWithParam<Kind> {};
INSTANTIATE_TEST_SUITE_P(All, DecodeKinds, testing::Values(Kind::softmax, Kind::linear, Kind::linear_plain),
                         [](const auto& info) {
                           return info.param == Kind::softmax  ? "softmax"
                                  : info.param == Kind::linear ? "linear"
                                                               : "linear_plain";
                         });

// Token by token against the definition on the same rounded inputs: one rounding of the result (two for the
// state's rows in fp64's case none), and fp32 sums over at most 150 rows and the width.
TEST_P(DecodeKinds, PlainDecodingIsTheDefinition) {
  const int count = 150;
  for (Sizes s : {Sizes{4, 2, 16}, Sizes{2, 1, 20}, Sizes{1, 1, 64}})
    for (DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16}) {
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
      const DType out = GetParam() == Kind::linear_plain ? kernels::main_dtype(dtype) : dtype;
      const double unit = out == DType::f16 ? 0x1p-11 : out == DType::bf16 ? 0x1p-8 : 0;
      const double sums =
          (dtype == DType::f64 ? 0x1p-53 : 0x1p-24) * static_cast<double>(2 * count + s.width);
      Decoder decoder(GetParam(), s, dtype, {0});
      for (Token t = 0; t < count; ++t) {
        const Row o = decoder.plain({t});
        for (size_t i = 0; i < o.size(); ++i) {
          const double y = expected[static_cast<size_t>(t) * o.size() + i];
          ASSERT_NEAR(o[i], y, unit * std::abs(y) + sums * largest + (unit > 0 ? 0x1p-25 : 0))
              << "token " << t;
        }
      }
    }
}

TEST_P(DecodeKinds, PrefillInChainsEqualsOneByOneBitForBit) {
  std::mt19937 random(1);
  for (DType dtype : {DType::f16, DType::f32}) {
    Decoder one(GetParam(), {4, 2, 16}, dtype, {0});
    std::vector<Row> expected;
    for (Token t = 0; t < 200; ++t) expected.push_back(one.plain({t}));
    for (int sample = 0; sample < 4; ++sample) {
      Decoder many(GetParam(), {4, 2, 16}, dtype, {0});
      while (many.length(0) < 200) {
        const int most = std::min(many.room(0), 200 - many.length(0));
        const int count = sample == 0 ? most : 1 + static_cast<int>(random() % static_cast<unsigned>(most));
        const int begin = many.length(0);
        const auto rows = many.step({chain(tokens_from(begin, count))})[0];
        for (int i = 0; i < count; ++i)
          ASSERT_EQ(rows[static_cast<size_t>(i)], expected[static_cast<size_t>(begin + i)])
              << begin << " + " << i;
        std::vector<int> all;
        for (int i = 0; i < count; ++i) all.push_back(i);
        many.commit({all});
      }
    }
  }
}

// Every node of a tree equals plain decoding of its path, and so does all that follows any accepted path.
TEST_P(DecodeKinds, TreeNodesEqualPlainDecodingBitForBit) {
  std::mt19937 random(2);
  for (int prefix : {0, 1, 47, 63, 64, 100, 127}) {
    Decoder before(GetParam(), {4, 2, 24}, DType::f16, {0});
    before.plain(tokens_from(0, prefix));
    for (int nodes : {2, 9, 31, 64}) {
      const int depth = std::min(before.room(0), nodes);
      if (depth < nodes && nodes == 64 && depth == 1) continue;
      const Tree tree = random_tree(random, depth == 1 ? 1 : nodes, depth, 1000);
      Decoder verify = before;
      const auto rows = verify.step({tree})[0];
      for (size_t i = 0; i < tree.size(); i += 1 + tree.size() / 12) {
        Decoder alone = before;
        ASSERT_EQ(rows[i], alone.plain(tokens_of(tree, path_to(tree, static_cast<int>(i)))))
            << "prefix " << prefix << ", node " << i << " of " << tree.size();
      }
      const auto path = path_to(tree, static_cast<int>(random() % tree.size()));
      verify.commit({path});
      Decoder plain = before;
      plain.plain(tokens_of(tree, path));
      for (Token t = 2000; t < 2070; ++t)
        ASSERT_EQ(verify.plain({t}), plain.plain({t})) << "after the tree " << t;
    }
  }
}

// A step that accepts drafts, steps that accept none (with and without drafts), then plain decoding.
TEST_P(DecodeKinds, RollingBackIsDoingNothing) {
  Decoder drafted(GetParam(), {2, 1, 16}, DType::f16, {0}), plain(GetParam(), {2, 1, 16}, DType::f16, {0});
  drafted.plain(tokens_from(0, 50));
  plain.plain(tokens_from(0, 50));
  drafted.step({{{50, -1}, {900, 0}, {51, 0}, {901, 1}, {52, 2}}});
  drafted.commit({{0, 2, 4}});
  plain.plain({50, 51, 52});
  for (int round = 0; round < 3; ++round) {
    drafted.step({chain(tokens_from(910 + round, 2 + round))});
    drafted.commit({{}});
  }
  drafted.step({chain({53})});
  drafted.commit({{}});
  for (Token t = 53; t < 140; ++t) {
    ASSERT_EQ(drafted.plain({t}), plain.plain({t})) << t;
    if (drafted.room(0) < 4) continue;
    drafted.step({chain(tokens_from(920 + t, 4))});
    drafted.commit({{}});
  }
}

// Sequences of different lengths and numbers of rows, one with none, beside each other and on any number of
// threads: each as if it were alone.
TEST_P(DecodeKinds, BatchedSequencesDoNotTouchEachOther) {
  const std::vector<int> prefixes = {3, 64, 0, 90, 127};
  std::mt19937 random(3);
  std::vector<Tree> trees;
  for (int prefix : prefixes)
    trees.push_back(prefix == 0
                        ? Tree{}
                        : random_tree(random, prefix == 127 ? 1 : 12, 64 - prefix % 64, 5000 + prefix * 100));
  std::vector<std::vector<Row>> expected, after;
  std::vector<std::vector<int>> paths;
  for (size_t b = 0; b < prefixes.size(); ++b) {
    Decoder alone(GetParam(), {4, 1, 64}, DType::f16, {0});
    alone.plain(tokens_from(static_cast<Token>(b) * 1000, prefixes[b]));
    expected.push_back(alone.step({trees[b]})[0]);
    paths.push_back(path_to(trees[b], static_cast<int>(trees[b].size()) - 1));
    alone.commit({paths[b]});
    after.push_back({alone.plain({77})});
  }
  for (int threads : {1, 2, 4}) {
    kernels::set_threads(threads);
    Decoder batch(GetParam(), {4, 1, 64}, DType::f16, std::vector<int>(prefixes.size(), 0));
    for (int t = 0; t < 127; ++t) {
      std::vector<Tree> step;
      std::vector<std::vector<int>> accept;
      for (size_t b = 0; b < prefixes.size(); ++b) {
        const bool takes = t < prefixes[b];
        step.push_back(takes ? chain({static_cast<Token>(b) * 1000 + t}) : Tree{});
        accept.push_back(takes ? std::vector<int>{0} : std::vector<int>{});
      }
      batch.step(step);
      batch.commit(accept);
    }
    EXPECT_EQ(batch.step(trees), expected) << threads << " threads";
    batch.commit(paths);
    EXPECT_EQ(batch.step(std::vector<Tree>(prefixes.size(), chain({77}))), after);
  }
  kernels::set_threads(0);
}

TEST_P(DecodeKinds, EveryInstructionSetIsRowInvariant) {
  support::with_each_instruction_set([&](const char* set) {
    SCOPED_TRACE(set);
    std::mt19937 random(4);
    Decoder before(GetParam(), {2, 1, 64}, DType::bf16, {0});
    before.plain(tokens_from(0, 37));
    const Tree tree = random_tree(random, 20, 6, 300);
    Decoder verify = before;
    const auto rows = verify.step({tree})[0];
    for (size_t i = 0; i < tree.size(); ++i) {
      Decoder alone = before;
      ASSERT_EQ(rows[i], alone.plain(tokens_of(tree, path_to(tree, static_cast<int>(i)))));
    }
  });
}

TEST(AttentionDecode, ErrorsNameTheSequence) {
  Decoder small(Kind::softmax, {1, 1, 8}, DType::f32, {0}, 4);
  small.plain({1, 2, 3});
  try {
    small.step({chain({4, 5})});
    FAIL() << "no error";
  } catch (const kernels::ShapeError& e) {
    EXPECT_STREQ(e.what(), "softmax_attention_decode: sequence 0 would need 5 slots, the state has 4");
  }
  Decoder fold(Kind::linear, {1, 1, 8}, DType::f32, {0});
  fold.plain(tokens_from(0, 62));
  fold.step({chain({70, 71, 72})});
  EXPECT_THROW(fold.commit({{0, 1, 2}}), kernels::ShapeError);
}

}  // namespace

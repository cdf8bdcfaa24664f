// Decoding: a row's result is the same bits alone, in a chain or in a tree, whatever happened before.
#include <gtest/gtest.h>

#include "kernels/core/parallel.h"
#include "tests/kernels/attention_decoder.h"
#include "tests/support/instruction_sets.h"

namespace {

using namespace decoding;

Maker maker(Kind kind) {
  return [kind](Sizes s, DType dtype, size_t sequences) { return Decoder(kind, s, dtype, sequences); };
}

class DecodeKinds : public testing::TestWithParam<Kind> {};
INSTANTIATE_TEST_SUITE_P(All, DecodeKinds, testing::Values(Kind::softmax, Kind::linear, Kind::linear_plain),
                         [](const auto& info) {
                           return info.param == Kind::softmax  ? "softmax"
                                  : info.param == Kind::linear ? "linear"
                                                               : "linear_plain";
                         });

// fp32 (or fp64) sums over the rows and the width.
TEST_P(DecodeKinds, PlainDecodingIsTheDefinition) {
  const int count = 150;
  for (Sizes s : {Sizes{4, 2, 16}, Sizes{2, 1, 20}, Sizes{1, 1, 64}})
    for (DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16})
      expect_definition(maker(GetParam()), s, dtype, count,
                        {.sums = static_cast<double>(2 * count + s.width)});
}

TEST_P(DecodeKinds, ChainsAreTheDefinition) {
  const int count = 150;
  expect_definition(maker(GetParam()), {4, 2, 16}, DType::f32, count, {.sums = 2 * count + 16.0}, 40);
}

TEST_P(DecodeKinds, PrefillInChainsEqualsOneByOneBitForBit) {
  for (DType dtype : {DType::f16, DType::f32})
    expect_chains_equal_plain(maker(GetParam()), {4, 2, 16}, dtype, 200, 4);
}

TEST_P(DecodeKinds, TreeNodesEqualPlainDecodingBitForBit) {
  expect_trees_equal_plain(maker(GetParam()), {4, 2, 24}, DType::f16, {0, 1, 47, 63, 64, 100, 127}, 12, 70);
}

// A step that accepts drafts, steps that accept none (with and without drafts), then plain decoding.
TEST_P(DecodeKinds, RollingBackIsDoingNothing) {
  Decoder drafted(GetParam(), {2, 1, 16}, DType::f16), plain = drafted;
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

TEST_P(DecodeKinds, BatchedSequencesDoNotTouchEachOtherOnAnyNumberOfThreads) {
  std::vector<std::vector<Row>> rows;
  for (int threads : {1, 2, 3, 4, 7}) {
    SCOPED_TRACE(threads);
    kernels::set_threads(threads);
    const auto again = expect_sequences_apart(maker(GetParam()), {4, 1, 64}, DType::f16);
    EXPECT_TRUE(rows.empty() || rows == again);
    rows = again;
  }
  kernels::set_threads(0);
}

TEST_P(DecodeKinds, EveryInstructionSetIsRowInvariant) {
  support::with_each_instruction_set([&](const char* set) {
    SCOPED_TRACE(set);
    expect_trees_equal_plain(maker(GetParam()), {2, 1, 64}, DType::bf16, {37}, 20, 1);
  });
}

TEST(AttentionDecode, ErrorsNameTheSequence) {
  Decoder small(Kind::softmax, {1, 1, 8}, DType::f32, 1, {}, 4);
  small.plain({1, 2, 3});
  try {
    small.step({chain({4, 5})});
    FAIL() << "no error";
  } catch (const kernels::ShapeError& e) {
    EXPECT_STREQ(e.what(), "softmax_attention_decode: sequence 0 would need 5 slots, the state has 4");
  }
  Decoder fold(Kind::linear, {1, 1, 8}, DType::f32);
  fold.plain(tokens_from(0, 62));
  fold.step({chain({70, 71, 72})});
  EXPECT_THROW(fold.commit({{0, 1, 2}}), kernels::ShapeError);
}

}  // namespace

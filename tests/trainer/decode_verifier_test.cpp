// Acceptance rules on explicit distributions: whatever the drafts, accepted tokens follow the target.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <set>

#include "kernels/core/arena.h"
#include "kernels/core/error.h"
#include "kernels/core/philox.h"
#include "kernels/core/row_math.h"
#include "tests/trainer/decode_statistics.h"
#include "trainer/decode/tree.h"
#include "trainer/decode/verifier.h"

namespace trainer {
namespace {

using decode_test::chi_square_tail;
using Distribution = std::vector<float>;

int32_t draw(const float* weights, int64_t count, float u) {
  return static_cast<int32_t>(kernels::row_draw(weights, count, u));
}

// Probability of counts at least this far from the expected ones, if they were drawn from them.
double p_value(const std::map<std::vector<int32_t>, double>& expected,
               const std::map<std::vector<int32_t>, int64_t>& counts, double samples) {
  double chi = 0;
  for (const auto& [outcome, count] : counts)
    if (!expected.contains(outcome)) return 0;
  for (const auto& [outcome, probability] : expected) {
    const auto found = counts.find(outcome);
    const double count = found == counts.end() ? 0 : static_cast<double>(found->second);
    chi += (count - samples * probability) * (count - samples * probability) / (samples * probability);
  }
  return chi_square_tail(chi, static_cast<double>(expected.size()) - 1);
}

// With fixed seeds a test either always or never fails; one in ten thousand right programs would.
constexpr double kThreshold = 1e-4;
constexpr int kSamples = 40000;

// A target over three tokens whose distribution depends on the token before (row 3: at the root).
const std::vector<Distribution> kTarget = {
    {.6f, .3f, .1f}, {.2f, .2f, .6f}, {.1f, .8f, .1f}, {.5f, .3f, .2f}};
constexpr int kVocabulary = 3, kRoot = 3;

// One step: `grow` builds the tree for a key, then `verify` accepts. Outcomes are the first two tokens; what
// a step does not decide is drawn from the target, as the next step would.
using Grow = std::function<void(DraftTree&, const SamplingKey&)>;
using Verify = std::function<void(const DraftTree&, const float*, const SamplingKey&, AcceptedPath&)>;

double run_pairs(const Grow& grow, const Verify& verify) {
  std::map<std::vector<int32_t>, double> expected;
  for (int32_t a = 0; a < kVocabulary; ++a)
    for (int32_t b = 0; b < kVocabulary; ++b) expected[{a, b}] = kTarget[kRoot][a] * kTarget[a][b];
  std::map<std::vector<int32_t>, int64_t> counts;
  DraftTree tree;
  AcceptedPath accepted;
  for (int i = 0; i < kSamples; ++i) {
    const SamplingKey key{static_cast<uint64_t>(i) + 1, 0};
    tree.clear(kRoot);
    grow(tree, key);
    std::vector<float> p;
    for (int node = 0; node < tree.size(); ++node)
      p.insert(p.end(), kTarget[tree.token(node)].begin(), kTarget[tree.token(node)].end());
    verify(tree, p.data(), key, accepted);
    std::vector<int32_t> outcome;
    for (size_t n = 1; n < accepted.nodes.size(); ++n) outcome.push_back(tree.token(accepted.nodes[n]));
    outcome.push_back(accepted.next);
    if (outcome.size() < 2)
      outcome.push_back(draw(kTarget[outcome[0]].data(), kVocabulary, key.next(kRoot * 7 + 2)));
    outcome.resize(2);
    ++counts[outcome];
  }
  return p_value(expected, counts, kSamples);
}

// One tree on the CPU; p and logits have a row of `vocabulary` numbers for each node.
class OneTree {
 public:
  OneTree(const DraftTree& tree, int64_t vocabulary) : tree_(tree), vocabulary_(vocabulary) {
    for (int pass = 0; pass < 2; ++pass) {
      if (pass == 1) scratch_.place();
      const kernels::ArenaScope scope(scratch_);
      scratch_.allocate("left", kernels::DType::f32, {2, vocabulary});
    }
    ctx_.scratch = &scratch_;
  }
  void rejection(const float* p, const SamplingKey& key, AcceptedPath& accepted) {
    verifier_.clear();
    verifier_.add_tree(tree_, key, kRoot * 7);
    verifier_.rejection(ctx_, rows(p));
    verifier_.read(0, tree_, accepted);
  }
  void typical(const float* logits, const float* p, const kernels::TypicalRule& rule,
               AcceptedPath& accepted) {
    verifier_.clear();
    verifier_.add_tree(tree_, {}, 0);
    verifier_.typical(ctx_, rows(logits), rows(p), rule);
    verifier_.read(0, tree_, accepted);
  }

 private:
  kernels::Tensor rows(const float* data) const {
    return {const_cast<float*>(data), kernels::DType::f32, {tree_.size(), vocabulary_}, {}};
  }
  const DraftTree& tree_;
  int64_t vocabulary_;
  kernels::Arena scratch_{"test", {}};
  kernels::Context ctx_;
  Verifier verifier_{{}, 1};
};

void right_rule(const DraftTree& tree, const float* p, const SamplingKey& key, AcceptedPath& accepted) {
  OneTree(tree, kVocabulary).rejection(p, key, accepted);
}

const Distribution kDraft1 = {.2f, .2f, .6f}, kDraft2 = {.2f, .5f, .3f};

float draw_key(const SamplingKey& key, int depth, int rank) { return key.draft(kRoot * 7 + depth, rank); }

// Siblings drawn from q without replacement.
std::vector<int32_t> draw_siblings(const Distribution& q, int count, const SamplingKey& key, int depth) {
  Distribution left = q;
  std::vector<int32_t> tokens;
  for (int rank = 0; rank < count; ++rank) {
    tokens.push_back(draw(left.data(), kVocabulary, draw_key(key, depth, rank)));
    left[tokens.back()] = 0;
  }
  return tokens;
}

void grow_drawn_chain(DraftTree& tree, const SamplingKey& key) {
  const int first = tree.add(0, draw_siblings(kDraft1, 1, key, 1)[0], kDraft1.data());
  tree.add(first, draw_siblings(kDraft2, 1, key, 2)[0], kDraft2.data());
}

void grow_fixed_chain(DraftTree& tree, const SamplingKey&) { tree.add(tree.add(0, 2), 1); }

void grow_drawn_tree(DraftTree& tree, const SamplingKey& key) {
  std::vector<int> nodes;
  for (const int32_t token : draw_siblings(kDraft1, 2, key, 1))
    nodes.push_back(tree.add(0, token, kDraft1.data()));
  const auto second = draw_siblings(kDraft2, 2, key, 2);
  tree.add(nodes[0], second[0], kDraft2.data());
  tree.add(nodes[0], second[1], kDraft2.data());
  tree.add(nodes[1], second[0], kDraft2.data());
}

void grow_fixed_tree(DraftTree& tree, const SamplingKey&) {
  const int a = tree.add(0, 1), b = tree.add(0, 2);
  tree.add(a, 2);
  tree.add(a, 0);
  tree.add(b, 1);
}

void grow_nothing(DraftTree&, const SamplingKey&) {}

TEST(Verifier, RejectionKeepsTheTargetsDistribution) {
  EXPECT_GT(run_pairs(grow_nothing, right_rule), kThreshold);
  EXPECT_GT(run_pairs(grow_drawn_chain, right_rule), kThreshold);
  EXPECT_GT(run_pairs(grow_fixed_chain, right_rule), kThreshold);
  EXPECT_GT(run_pairs(grow_drawn_tree, right_rule), kThreshold);
  EXPECT_GT(run_pairs(grow_fixed_tree, right_rule), kThreshold);
}

// The same test must see wrong rules: accepting every draft, and siblings without the correction for drawing
// without replacement.
TEST(Verifier, WrongRulesFailTheSameTest) {
  const Verify accept_all = [](const DraftTree& tree, const float* p, const SamplingKey& key,
                               AcceptedPath& accepted) {
    accepted.nodes.resize(tree.size());
    for (int i = 0; i < tree.size(); ++i) accepted.nodes[i] = i;
    accepted.next = draw(p + (tree.size() - 1) * kVocabulary, kVocabulary, key.next(kRoot * 7 + 3));
  };
  EXPECT_LT(run_pairs(grow_drawn_chain, accept_all), kThreshold);

  const Verify no_correction = [](const DraftTree& tree, const float* p, const SamplingKey& key,
                                  AcceptedPath& accepted) {
    Distribution left(p, p + kVocabulary);
    accepted.nodes.assign(1, 0);
    int sibling = 0;
    for (int child = 1; child < tree.size(); ++child) {
      if (tree.parent(child) != 0) continue;
      const int32_t x = tree.token(child);
      if (key.accept(kRoot * 7 + 1, sibling++) * kDraft1[x] < left[x]) {
        accepted.nodes.push_back(child);
        accepted.next = draw(kTarget[x].data(), kVocabulary, key.next(kRoot * 7 + 2));
        return;
      }
      float total = 0;
      for (int i = 0; i < kVocabulary; ++i) total += left[i] = std::max(left[i] - kDraft1[i], 0.0f);
      for (float& value : left) value /= total;
    }
    accepted.next = draw(left.data(), kVocabulary, key.next(kRoot * 7 + 1));
  };
  EXPECT_LT(run_pairs(grow_drawn_tree, no_correction), kThreshold);
}

// Drafts as good as the target are always accepted.
TEST(Verifier, EqualDistributionsAcceptEverything) {
  const Grow grow = [](DraftTree& tree, const SamplingKey& key) {
    tree.add(0, draw_siblings(kTarget[kRoot], 1, key, 1)[0], kTarget[kRoot].data());
  };
  AcceptedPath accepted;
  DraftTree tree;
  for (uint64_t seed = 1; seed < 2000; ++seed) {
    tree.clear(kRoot);
    grow(tree, {seed, 0});
    std::vector<float> p = kTarget[kRoot];
    p.insert(p.end(), kTarget[tree.token(1)].begin(), kTarget[tree.token(1)].end());
    right_rule(tree, p.data(), {seed, 0}, accepted);
    EXPECT_EQ(accepted.nodes.size(), 2u);
  }
}

TEST(Verifier, GreedyFollowsTheArgmaxThroughATree) {
  DraftTree tree;
  tree.clear(9);
  const int a = tree.add(0, 4), b = tree.add(0, 5);
  tree.add(a, 6);
  const int d = tree.add(b, 7);
  const std::vector<int32_t> argmax = {5, 1, 7, 1, 8};  // after root, a, b, c, d
  AcceptedPath accepted;
  Verifier::greedy(
      tree, [&](int node) { return argmax[node]; }, accepted);
  EXPECT_EQ(accepted.nodes, (std::vector<int32_t>{0, b, d}));
  EXPECT_EQ(accepted.next, 8);
  const std::vector<int32_t> other = {3, 1, 7, 1, 8};
  Verifier::greedy(
      tree, [&](int node) { return other[node]; }, accepted);
  EXPECT_EQ(accepted.nodes, (std::vector<int32_t>{0}));
  EXPECT_EQ(accepted.next, 3);
}

TEST(Verifier, TypicalAcceptsByProbabilityOrEntropy) {
  const int v = 8;
  // Flat: H = ln 8, delta exp(-H) = 0.3 / 8 = 0.0375, so every token (0.125) passes. Peaked: token 1 has
  // 0.02, H = 0.2, threshold min(0.09, 0.24): it fails.
  const double rest = 0.02 / 6;
  Distribution flat(v, 0.125f), peaked(v, static_cast<float>(rest));
  peaked[0] = 0.96f;
  peaked[1] = 0.02f;
  std::vector<float> p, logits;
  for (const Distribution* row : {&flat, &peaked, &flat, &peaked}) {
    p.insert(p.end(), row->begin(), row->end());
    for (const float x : *row) logits.push_back(std::log(x) * 0.7f);  // temperature 0.7
  }
  DraftTree tree;
  tree.clear(0);
  const int a = tree.add(0, 3), b = tree.add(0, 5);
  tree.add(a, 1);  // rejected: below a peaked row
  AcceptedPath accepted;
  const kernels::TypicalRule rule{0.7, 0.09, 0.3};
  OneTree(tree, v).typical(logits.data(), p.data(), rule, accepted);
  EXPECT_EQ(accepted.nodes, (std::vector<int32_t>{0, a}));
  EXPECT_EQ(accepted.next, 0);
  const int d = tree.add(b, 6);  // accepted: below a flat row, and longer
  p.insert(p.end(), peaked.begin(), peaked.end());
  logits.insert(logits.end(), logits.begin() + v, logits.begin() + 2 * v);
  OneTree(tree, v).typical(logits.data(), p.data(), rule, accepted);
  EXPECT_EQ(accepted.nodes, (std::vector<int32_t>{0, b, d}));
}

TEST(Verifier, RandomNumbersBelongToPositions) {
  const SamplingKey key{7, 3};
  EXPECT_EQ(key.next(11), (SamplingKey{7, 3}.next(11)));
  std::set<float> seen;
  for (int position = 0; position < 50; ++position)
    for (const float u : {key.next(position), key.accept(position, 0), key.draft(position, 0),
                          SamplingKey{7, 4}.next(position), SamplingKey{8, 3}.next(position)})
      seen.insert(u);
  EXPECT_GT(seen.size(), 248u);  // 250 numbers of 24 bits: a collision has probability 0.2 percent
}

TEST(Verifier, EveryTextOfAnEvaluationHasASeedOfItsOwn) {
  std::set<uint64_t> seeds;
  for (const uint64_t seed : {1, 2})
    for (const TextUse use : {TextUse::calibration, TextUse::tuning, TextUse::timing})
      for (int64_t round = 0; round < 20; ++round)
        for (int64_t prompt = 0; prompt < 20; ++prompt) seeds.insert(text_seed(seed, use, round, prompt));
  EXPECT_EQ(seeds.size(), 2u * 3u * 20u * 20u);
  EXPECT_EQ(text_seed(7, TextUse::timing, 2, 5), text_seed(7, TextUse::timing, 2, 5));
}

TEST(Verifier, UnknownRuleIsNamed) {
  EXPECT_EQ(parse_acceptance("typical"), Acceptance::typical);
  EXPECT_THROW(parse_acceptance("greed"), kernels::ConfigError);
}

TEST(Tree, AncestorsAndDepths) {
  DraftTree tree;
  tree.clear(1);
  const int a = tree.add(0, 2), b = tree.add(0, 3), c = tree.add(b, 4);
  EXPECT_EQ(tree.ancestors(0), 1u);
  EXPECT_EQ(tree.ancestors(a), 0b11u);
  EXPECT_EQ(tree.ancestors(c), 0b1101u);
  EXPECT_EQ(tree.depth(c), 2);
  EXPECT_EQ(tree.max_depth(), 2);
  EXPECT_THROW(tree.add(7, 1), kernels::ShapeError);
}

// Every set of drafts closed under parents and earlier siblings is a tree; none of the same size is worth
// more.
TEST(Tree, BestTreeIsBest) {
  const std::vector<std::vector<double>> acceptance = {{.55, .2, .1}, {.5, .15, .05}, {.4, .1, .02}};
  struct Node {
    int parent, level, rank;
    double value;
  };
  std::vector<Node> all;
  const std::function<void(int, int, double)> expand = [&](int parent, int level, double value) {
    for (int rank = 0; level < 3 && rank < 3; ++rank) {
      const int node = static_cast<int>(all.size());
      all.push_back({parent, level, rank, value * acceptance[level][rank]});
      expand(node, level + 1, all[node].value);
    }
  };
  expand(-1, 0, 1);
  std::vector<double> values;
  for (const Node& node : all) values.push_back(node.value);
  std::sort(values.rbegin(), values.rend());
  for (const int size : {1, 4, 9, 20}) {
    const TreeShape shape = best_tree(acceptance, size);
    ASSERT_EQ(shape.size(), size);
    double total = 0, best = 0;
    for (int i = 0; i < size; ++i) {
      total += shape.values[i];
      best += values[i];
      EXPECT_LT(shape.parents[i], i);
      EXPECT_EQ(shape.depths[i], shape.parents[i] < 0 ? 1 : shape.depths[shape.parents[i]] + 1);
    }
    EXPECT_NEAR(total, best, 1e-12);
  }
}

}  // namespace
}  // namespace trainer

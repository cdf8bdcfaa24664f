// The engine: speculation changes how fast text comes, never which text.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "kernels/core/error.h"
#include "kernels/ops/sampling.h"
#include "tests/trainer/decode_model.h"
#include "tests/trainer/decode_statistics.h"
#include "trainer/decode/costs.h"
#include "trainer/decode/decoder.h"
#include "trainer/decode/drafters/medusa.h"
#include "trainer/decode/drafters/ngram.h"
#include "trainer/decode/repetition.h"

namespace trainer {
namespace {

using decode_test::random_tokens;
using decode_test::tiny_model;
using decode_test::TinyOptions;
using Prompts = std::vector<std::vector<int32_t>>;

constexpr int64_t kCapacity = 320, kVocabulary = 40;

DecodeSettings greedy(int64_t max_tokens) {
  DecodeSettings settings;
  settings.max_tokens = max_tokens;
  return settings;
}

// A drafter made of one function.
class ScriptedDrafter : public Drafter {
 public:
  using Script = std::function<void(const SequenceView&, int64_t sequence, DraftTree&)>;
  explicit ScriptedDrafter(Script script) : script_(std::move(script)) {}
  void reset(const Context&) override {}
  void observe(const Context&, int64_t, const SequenceView& view, const Tensor&,
               std::span<const int32_t> rows, int64_t first) override {
    // What was committed is the text, up to the root.
    EXPECT_LE(first + static_cast<int64_t>(rows.size()), static_cast<int64_t>(view.tokens.size()));
  }
  void propose(const Context&, std::span<const SequenceView> views, const DraftSettings&,
               std::span<DraftTree> trees) override {
    for (size_t b = 0; b < views.size(); ++b)
      if (views[b].active) script_(views[b], static_cast<int64_t>(b), trees[b]);
  }
  void set_drafts(int64_t) override {}
  int64_t max_drafts() const override { return 8; }

 private:
  Script script_;
};

ScriptedDrafter::Script garbage(uint64_t seed) {
  return [seed](const SequenceView& view, int64_t, DraftTree& tree) {
    const auto random = [&](int64_t i) {
      return kernels::philox(seed, kernels::Purpose::test,
                             static_cast<uint64_t>(view.root_position() * 64 + i))[0];
    };
    for (int64_t i = 0; i < std::min<int64_t>(9, view.max_drafts); ++i) {
      const int parent = static_cast<int>(random(2 * i) % static_cast<uint32_t>(tree.size()));
      if (tree.depth(parent) < view.max_depth)
        tree.add(parent, static_cast<int32_t>(random(2 * i + 1) % static_cast<uint32_t>(kVocabulary)));
    }
  };
}

// Proposes the text that plain decoding wrote: a chain beside wrong siblings. Every third step proposes
// nothing, so that steps with accepted drafts are followed by steps with none.
ScriptedDrafter::Script oracle(const std::vector<std::vector<int32_t>>& texts, bool with_gaps) {
  return [&texts, with_gaps](const SequenceView& view, int64_t b, DraftTree& tree) {
    if (with_gaps && view.root_position() % 3 == 0) return;
    int parent = 0;
    for (int64_t d = 1; d <= std::min<int64_t>(4, view.max_depth); ++d) {
      const size_t at = static_cast<size_t>(view.root_position() + d);
      if (at >= texts[b].size()) return;
      const int32_t right = texts[b][at];
      if (tree.drafts() + 2 > view.max_drafts) return;
      tree.add(parent, (right + 1) % static_cast<int32_t>(kVocabulary));
      parent = tree.add(parent, right);
    }
  };
}

std::vector<int32_t> joined(const std::vector<int32_t>& prompt, const DecodedSequence& sequence) {
  std::vector<int32_t> text = prompt;
  text.insert(text.end(), sequence.tokens.begin(), sequence.tokens.end());
  return text;
}

struct Case {
  std::string attention, compute;
  int64_t mtp;
  bool sequential = false;
};

class Speculation : public testing::TestWithParam<Case> {
 protected:
  Speculation() {
    TinyOptions options;
    options.attention = GetParam().attention;
    options.compute = GetParam().compute;
    options.mtp = GetParam().mtp;
    options.medusa_sequential = GetParam().sequential;
    model_ = tiny_model(options);
  }
  std::unique_ptr<Model> model_;
};

// Every drafter of the table, and drafters that are always and never right: token for token the plain text,
// over several folds (64, 128, 192).
TEST_P(Speculation, GreedyTextIsThatOfPlainDecoding) {
  const kernels::Context ctx;
  Decoder decoder(ctx, *model_, 1, kCapacity);
  for (const int64_t length : {1, 37, 64}) {
    const Prompts prompts = {random_tokens(length, 100 + static_cast<uint64_t>(length))};
    const DecodeRun plain = decoder.run(prompts, greedy(200));
    ASSERT_EQ(plain.sequences[0].tokens.size(), 200u);
    EXPECT_EQ(plain.steps, 199);
    // The text is worth comparing: it does not repeat one token.
    const std::set<int32_t> used(plain.sequences[0].tokens.begin(), plain.sequences[0].tokens.end());
    EXPECT_GT(used.size(), 5u);

    const std::vector<std::vector<int32_t>> texts = {joined(prompts[0], plain.sequences[0])};
    for (const DrafterKind& kind : drafters()) {
      const auto drafter = make_drafter(decoder, kind.name, model_->config().decode);
      EXPECT_EQ(decoder.run(prompts, greedy(200), drafter.get()).sequences[0].tokens,
                plain.sequences[0].tokens)
          << kind.name << " after " << length;
    }
    ScriptedDrafter wrong(garbage(3)), right(oracle(texts, false)), gaps(oracle(texts, true));
    EXPECT_EQ(decoder.run(prompts, greedy(200), &wrong).sequences[0].tokens, plain.sequences[0].tokens);
    const DecodeRun fast = decoder.run(prompts, greedy(200), &right);
    EXPECT_EQ(fast.sequences[0].tokens, plain.sequences[0].tokens);
    // Four drafts are accepted wherever the fold and the end allow.
    EXPECT_LT(fast.steps, 199 / 4);
    EXPECT_EQ(decoder.run(prompts, greedy(200), &gaps).sequences[0].tokens, plain.sequences[0].tokens);
  }
}

// With the guard against loops a text holds no run twice, and speculation still writes the plain text.
TEST_P(Speculation, WithoutRepeatsToo) {
  const kernels::Context ctx;
  Decoder decoder(ctx, *model_, 1, kCapacity);
  const Prompts prompts = {random_tokens(20, 9)};
  DecodeSettings settings = greedy(200);
  settings.no_repeat = 2;
  const std::vector<int32_t> free = decoder.run(prompts, greedy(200)).sequences[0].tokens;
  const DecodeRun plain = decoder.run(prompts, settings);
  const std::vector<int32_t>& tokens = plain.sequences[0].tokens;
  ASSERT_EQ(tokens.size(), 200u);
  EXPECT_NE(tokens, free) << "the guard had something to do";
  for (size_t i = 0; i < tokens.size(); ++i)
    EXPECT_FALSE(repeats_run({tokens.data(), i}, tokens[i], settings.no_repeat)) << "at " << i;
  const std::vector<int32_t> text = joined(prompts[0], plain.sequences[0]);
  for (const DrafterKind& kind : drafters()) {
    const auto drafter = make_drafter(decoder, kind.name, model_->config().decode);
    EXPECT_EQ(decoder.run(prompts, settings, drafter.get()).sequences[0].tokens, tokens) << kind.name;
  }
  const std::vector<std::vector<int32_t>> texts = {text};
  ScriptedDrafter right(oracle(texts, false));
  const DecodeRun fast = decoder.run(prompts, settings, &right);
  EXPECT_EQ(fast.sequences[0].tokens, tokens);
  EXPECT_LT(fast.steps, 199 / 4) << "drafts that avoid repeats are accepted";
}

TEST(Repetition, SecondBestIsTakenWhereTheBestRepeats) {
  const std::vector<int32_t> tokens = {1, 2, 3, 1, 2};
  EXPECT_TRUE(repeats_run(tokens, 3, 3));
  EXPECT_FALSE(repeats_run(tokens, 1, 3));
  EXPECT_FALSE(repeats_run(tokens, 3, 4)) << "only three tokens of it stand there";
  const std::vector<float> logits = {0.5f, 0.1f, 0.7f, 0.9f};
  EXPECT_EQ(without_repeats(tokens, logits, 3, 3), 2);
  EXPECT_EQ(without_repeats(tokens, logits, 3, 4), 3);
  EXPECT_EQ(without_repeats({tokens.data(), 1}, logits, 3, 3), 3) << "a text shorter than the run";
}

// Sequences of other lengths beside it change neither a text nor what is drafted for it.
TEST_P(Speculation, ABatchIsItsSequencesAlone) {
  const kernels::Context ctx;
  Decoder one(ctx, *model_, 1, kCapacity), many(ctx, *model_, 3, kCapacity);
  const Prompts prompts = {random_tokens(5, 1), random_tokens(70, 2), random_tokens(33, 3)};
  std::vector<std::vector<int32_t>> texts;
  for (const auto& prompt : prompts)
    texts.push_back(joined(prompt, one.run({&prompt, 1}, greedy(110)).sequences[0]));
  const auto check = [&](Drafter* drafter, const std::string& name) {
    const DecodeRun run = many.run(prompts, greedy(110), drafter);
    for (size_t b = 0; b < prompts.size(); ++b)
      EXPECT_EQ(joined(prompts[b], run.sequences[b]), texts[b]) << name << ", sequence " << b;
    return run;
  };
  check(nullptr, "plain");
  for (const DrafterKind& kind : drafters()) {
    const DecodeRun run = check(make_drafter(many, kind.name, model_->config().decode).get(), kind.name);
    const auto alone = make_drafter(one, kind.name, model_->config().decode);
    for (size_t b = 0; b < prompts.size(); ++b)
      EXPECT_EQ(run.sequences[b].gained,
                one.run({&prompts[b], 1}, greedy(110), alone.get()).sequences[0].gained)
          << kind.name << ", sequence " << b;
  }
  ScriptedDrafter gaps(oracle(texts, true)), wrong(garbage(8));
  check(&gaps, "oracle with gaps");
  check(&wrong, "garbage");
}

INSTANTIATE_TEST_SUITE_P(Decode, Speculation,
                         testing::Values(Case{"linear", "fp32", 1}, Case{"softmax", "fp16", 2},
                                         Case{"linear,softmax", "fp16", 3, true}),
                         [](const auto& info) {
                           std::string name = info.param.attention + "_" + info.param.compute;
                           std::replace(name.begin(), name.end(), ',', '_');
                           return name;
                         });

// An accepted run that holds the end of the text stops there, also in the middle of a step.
TEST(Decoder, EndOfTextInsideAnAcceptedRunCutsIt) {
  const kernels::Context ctx;
  const auto model = tiny_model({});
  Decoder decoder(ctx, *model, 1, kCapacity);
  const Prompts prompts = {random_tokens(20, 9)};
  const DecodeRun plain = decoder.run(prompts, greedy(40));
  const std::vector<std::vector<int32_t>> texts = {joined(prompts[0], plain.sequences[0])};
  for (size_t stop = 0; stop < 12; ++stop) {
    DecodeSettings settings = greedy(40);
    settings.end_of_text = plain.sequences[0].tokens[stop];
    const DecodeRun cut = decoder.run(prompts, settings);
    ScriptedDrafter right(oracle(texts, false));
    const DecodeRun fast = decoder.run(prompts, settings, &right);
    EXPECT_EQ(fast.sequences[0].tokens, cut.sequences[0].tokens);
    EXPECT_EQ(cut.sequences[0].tokens.back(), settings.end_of_text);
    EXPECT_LE(cut.sequences[0].tokens.size(), stop + 1);
    int64_t gained = 0;
    for (const int64_t g : fast.sequences[0].gained) gained += g;
    EXPECT_EQ(gained, static_cast<int64_t>(fast.sequences[0].tokens.size()));
  }
}

// Learned positions end at the context: decoding stops there instead of reading past it.
TEST(Decoder, LearnedPositionsEndAtTheContext) {
  const kernels::Context ctx;
  TinyOptions options;
  options.position = "learned";
  options.context = 48;
  const auto model = tiny_model(options);
  Decoder decoder(ctx, *model, 1, 128);
  const Prompts prompts = {random_tokens(20, 4)};
  const DecodeRun plain = decoder.run(prompts, greedy(100));
  EXPECT_EQ(plain.sequences[0].tokens.size(), 48u - 20u + 1u);
  for (const DrafterKind& kind : drafters()) {
    const auto drafter = make_drafter(decoder, kind.name, model->config().decode);
    EXPECT_EQ(decoder.run(prompts, greedy(100), drafter.get()).sequences[0].tokens,
              plain.sequences[0].tokens);
  }
  EXPECT_EQ(measure_step_costs(decoder, 64, greedy(100)).size(), 48u);
  const Prompts full = {random_tokens(48, 4)};
  EXPECT_THROW(decoder.run(full, greedy(10)), kernels::ConfigError);
}

// Medusa heads with vocabulary layers of their own draft through those.
TEST(Decoder, OwnVocabularyLayersDraftLosslessly) {
  const kernels::Context ctx;
  TinyOptions options;
  options.medusa_vocabulary = "own";
  for (const bool sequential : {false, true}) {
    options.medusa_sequential = sequential;
    const auto model = tiny_model(options);
    Decoder decoder(ctx, *model, 1, kCapacity);
    const Prompts prompts = {random_tokens(20, 6)};
    const auto plain = decoder.run(prompts, greedy(80)).sequences[0].tokens;
    for (const char* name : {"medusa", "medusa_tree"}) {
      const auto drafter = make_drafter(decoder, name, model->config().decode);
      EXPECT_EQ(decoder.run(prompts, greedy(80), drafter.get()).sequences[0].tokens, plain) << name;
    }
  }
}

// The first four sampled tokens of many seeds, two drafts deep, come from one distribution (two-sample
// chi-square on the texts; p-value 1e-4).
class Sampling : public testing::TestWithParam<bool> {};

TEST_P(Sampling, RejectionKeepsTheDistribution) {
  const kernels::Context ctx;
  TinyOptions options;
  options.medusa_sequential = GetParam();
  options.vocabulary = 4;
  options.sharpness = 0.5;
  const auto model = tiny_model(options);
  Decoder decoder(ctx, *model, 1, 128);
  const Prompts prompts = {random_tokens(7, 12, 4)};
  constexpr int kSeeds = 3000;
  using Counts = std::map<std::vector<int32_t>, double>;
  const auto sample = [&](Drafter* drafter, uint64_t from) {
    Counts counts;
    for (uint64_t seed = from; seed < from + kSeeds; ++seed) {
      DecodeSettings settings = greedy(4);
      settings.acceptance = Acceptance::rejection;
      settings.temperature = 1;
      settings.seed = seed;
      counts[decoder.run(prompts, settings, drafter).sequences[0].tokens] += 1;
    }
    return counts;
  };
  const Counts plain = sample(nullptr, 1);
  EXPECT_GT(plain.size(), 30u);
  for (const DrafterKind& kind : drafters()) {
    if (GetParam() && !std::string_view(kind.name).starts_with("medusa")) continue;
    const auto drafter = make_drafter(decoder, kind.name, model->config().decode);
    const Counts drafted = sample(drafter.get(), 100000);
    double chi = 0, cells = 0, rest_a = 0, rest_b = 0;
    std::set<std::vector<int32_t>> outcomes;
    for (const Counts* counts : {&plain, &drafted})
      for (const auto& [tokens, count] : *counts) outcomes.insert(tokens);
    const auto add = [&](double a, double b) {
      if (a + b == 0) return;
      chi += (a - b) * (a - b) / (a + b);
      cells += 1;
    };
    for (const auto& tokens : outcomes) {
      const double a = plain.contains(tokens) ? plain.at(tokens) : 0;
      const double b = drafted.contains(tokens) ? drafted.at(tokens) : 0;
      // Cells too small for the approximation are taken together.
      if (a + b >= 10) {
        add(a, b);
      } else {
        rest_a += a;
        rest_b += b;
      }
    }
    add(rest_a, rest_b);
    EXPECT_GT(decode_test::chi_square_tail(chi, cells - 1), 1e-4)
        << kind.name << ": chi-square " << chi << " over " << cells - 1;
  }
}

INSTANTIATE_TEST_SUITE_P(Decode, Sampling, testing::Bool(), [](const auto& info) {
  return std::string(info.param ? "sequential_heads" : "every_drafter");
});

// The same seed gives the same text, whatever stands in other sequences of the batch; another sequence or
// seed gives another, also after the same prompt.
TEST_P(Speculation, SamplingIsKeyedBySequenceAndPosition) {
  const kernels::Context ctx;
  Decoder one(ctx, *model_, 1, 160), many(ctx, *model_, 3, 160);
  const Prompts alone = {random_tokens(7, 12)}, same(3, alone[0]),
                others = {alone[0], random_tokens(70, 2), random_tokens(33, 3)};
  DecodeSettings settings = greedy(60);
  settings.acceptance = Acceptance::rejection;
  settings.temperature = 1;
  std::vector<std::string> names = {"none"};
  for (const DrafterKind& kind : drafters()) names.emplace_back(kind.name);
  for (const std::string& name : names) {
    const configs::DecodeConfig& config = model_->config().decode;
    const auto single = make_drafter(one, name, config), shared = make_drafter(many, name, config);
    settings.seed = 1;
    const auto text = one.run(alone, settings, single.get()).sequences[0].tokens;
    EXPECT_EQ(one.run(alone, settings, single.get()).sequences[0].tokens, text) << name;
    EXPECT_EQ(many.run(others, settings, shared.get()).sequences[0].tokens, text) << name;
    const DecodeRun batch = many.run(same, settings, shared.get());
    EXPECT_EQ(batch.sequences[0].tokens, text) << name;
    EXPECT_NE(batch.sequences[1].tokens, text) << name;
    EXPECT_NE(batch.sequences[2].tokens, text) << name;
    EXPECT_NE(batch.sequences[1].tokens, batch.sequences[2].tokens) << name;
    settings.seed = 2;
    EXPECT_NE(one.run(alone, settings, single.get()).sequences[0].tokens, text) << name;
  }
}

// Drafts that come in another order than their drafter's best first.
TEST(Decoder, CountsDraftsByTheirPlaces) {
  const auto model = tiny_model({});
  Decoder decoder({}, *model, 1, kCapacity);
  const Prompts prompts = {random_tokens(7, 12)};
  const std::vector<int32_t> text = joined(prompts[0], decoder.run(prompts, greedy(60)).sequences[0]);
  ScriptedDrafter drafter([&](const SequenceView& view, int64_t, DraftTree& tree) {
    if (view.max_depth < 2) return;
    const auto right = [&](int64_t d) { return text[static_cast<size_t>(view.root_position() + d)]; };
    tree.add(0, (right(1) + 1) % static_cast<int32_t>(kVocabulary), nullptr, 5);
    const int first = tree.add(0, right(1), nullptr, 1);
    tree.add(first, right(2), nullptr, 3);
  });
  const DecodeRun run = decoder.run(prompts, greedy(60), &drafter);
  const auto expect = [](const std::vector<int64_t>& counts, const std::map<size_t, int64_t>& expected) {
    for (size_t d = 0; d < counts.size(); ++d)
      EXPECT_EQ(counts[d], expected.contains(d) ? expected.at(d) : 0) << d;
  };
  const int64_t steps = run.reached[1];
  EXPECT_GT(steps, 15);
  expect(run.drafted, {{1, steps}, {3, steps}, {5, steps}});
  expect(run.accepted, {{1, steps}, {3, steps}});
}

// Typical acceptance with a threshold that nothing passes is greedy decoding; one that everything passes
// accepts every draft.
TEST(Decoder, TypicalAcceptanceBetweenItsExtremes) {
  const kernels::Context ctx;
  const auto model = tiny_model({});
  Decoder decoder(ctx, *model, 1, kCapacity);
  const Prompts prompts = {random_tokens(7, 12)};
  DecodeSettings settings = greedy(60);
  settings.acceptance = Acceptance::typical;
  settings.temperature = 1;
  settings.typical_epsilon = 1;
  settings.typical_delta = 1e9;
  const auto drafter = make_drafter(decoder, "medusa", model->config().decode);
  EXPECT_EQ(decoder.run(prompts, settings, drafter.get()).sequences[0].tokens,
            decoder.run(prompts, greedy(60)).sequences[0].tokens);
  settings.typical_epsilon = 0;
  const DecodeRun all = decoder.run(prompts, settings, drafter.get());
  EXPECT_EQ(all.proposed, all.reached);
  EXPECT_GT(all.reached[2], 0);
}

TEST(Drafters, NamesAreKnownOrExplained) {
  ASSERT_EQ(drafters().size(), configs::drafter_names().size());
  for (size_t i = 0; i < drafters().size(); ++i)
    EXPECT_EQ(configs::drafter_names()[i].name, std::string(drafters()[i].name));
  configs::Config config = decode_test::tiny_config({});
  EXPECT_STREQ(find_drafter("ngram", config).name, "ngram");
  EXPECT_THROW(find_drafter("eagle", config), kernels::ConfigError);
  config.heads.medusa = 0;
  EXPECT_THROW(find_drafter("medusa", config), kernels::ConfigError);
}

TEST(Drafters, NgramFindsTheLongestAndLatest) {
  NgramIndex index(64);
  // "1 2 3 | 9", later "5 2 3 | 8": after "... 1 2 3" the longer match wins, after "7 2 3" the latest.
  std::vector<int32_t> text = {1, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3};
  index.extend(text);
  EXPECT_EQ(index.find(text), 3);
  text = {1, 2, 3, 9, 5, 2, 3, 8, 7, 2, 3};
  index.clear();
  index.extend(text);
  EXPECT_EQ(index.find(text), 7);
  text = {1, 2, 3, 4};
  index.clear();
  index.extend(text);
  EXPECT_EQ(index.find(text), -1);
}

// A text that repeats is drafted as far as wanted, beyond its end.
TEST(Drafters, NgramGoesOnRepeating) {
  DrafterParams params;
  params.capacity = 64;
  NgramDrafter drafter(params);
  const std::vector<int32_t> text = {5, 1, 2, 1, 2, 1, 2};
  SequenceView view;
  view.tokens = text;
  view.max_depth = view.max_drafts = 10;
  DraftTree tree;
  tree.clear(text.back());
  drafter.observe({}, 0, view, {}, {}, 0);
  drafter.propose({}, {&view, 1}, {}, {&tree, 1});
  ASSERT_EQ(tree.drafts(), 4);
  for (int node = 1; node <= 4; ++node) EXPECT_EQ(tree.token(node), node % 2 ? 1 : 2);
}

// What a hash table of the index says equals a search through the text.
TEST(Drafters, NgramAgreesWithASearch) {
  const std::vector<int32_t> text = random_tokens(400, 77, 5);
  NgramIndex index(512);
  int64_t found = 0;
  for (size_t size = 1; size <= text.size(); ++size) {
    const std::span<const int32_t> now(text.data(), size);
    index.extend(now);
    int64_t expected = -1;
    for (int64_t n = 4; n >= 2 && expected < 0; --n)
      for (int64_t at = static_cast<int64_t>(size) - 1; at >= n && expected < 0; --at)
        if (static_cast<int64_t>(size) >= n && std::equal(now.end() - n, now.end(), now.begin() + at - n))
          expected = at;
    const int64_t got = index.find(now);
    // Slots are shared: an older entry may be lost to another n-gram, never a wrong one returned.
    EXPECT_TRUE(got < 0 || std::equal(now.end() - 2, now.end(), now.begin() + got - 2));
    found += got == expected;
  }
  EXPECT_GT(found, 380);
}

}  // namespace
}  // namespace trainer

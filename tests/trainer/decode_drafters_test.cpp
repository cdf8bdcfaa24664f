// What the learned drafters propose equals what their heads say when everything is computed afresh from the
// text.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "kernels/ops/sampling.h"
#include "tests/trainer/decode_model.h"
#include "trainer/decode/decoder.h"
#include "trainer/decode/drafters/medusa.h"
#include "trainer/decode/step_rows.h"

namespace trainer {
namespace {

using decode_test::random_tokens;
using decode_test::tiny_model;
using decode_test::TinyOptions;

// Hands everything on to a drafter, keeps the hidden states of the text, and has each proposal checked.
class CheckedDrafter : public Drafter {
 public:
  // Of a text whose last token is the root; hidden (rows of the text before it, C).
  using Check = std::function<void(const Context&, const std::vector<int32_t>& text, const Tensor& hidden,
                                   const DraftTree&)>;
  CheckedDrafter(std::unique_ptr<Drafter> inner, const Model& model, Check check)
      : inner_(std::move(inner)),
        check_(std::move(check)),
        values_(512 * model.width()),
        hidden_(values_.data(), DType::f32, {512, model.width()}) {}

  void reset(const Context& ctx) override { inner_->reset(ctx); }
  void observe(const Context& ctx, int64_t b, const SequenceView& view, const Tensor& hidden,
               std::span<const int32_t> rows, int64_t first) override {
    for (size_t i = 0; i < rows.size(); ++i)
      std::copy_n(hidden.slice(rows[i], 1).as<float>(), hidden.cols(),
                  hidden_.slice(first + static_cast<int64_t>(i), 1).as<float>());
    inner_->observe(ctx, b, view, hidden, rows, first);
  }
  void propose(const Context& ctx, std::span<const SequenceView> views, const DraftSettings& settings,
               std::span<DraftTree> trees) override {
    inner_->propose(ctx, views, settings, trees);
    const std::vector<int32_t> text(views[0].tokens.begin(), views[0].tokens.end());
    check_(ctx, text, hidden_.slice(0, views[0].root_position()), trees[0]);
    full_ += trees[0].drafts() == std::min({max_drafts(), views[0].max_depth, views[0].max_drafts});
    accept_some(views[0], trees[0]);
    steps_ += 1;
  }
  // Drafts that will be accepted take the place of the proposed ones, so that steps commit several rows.
  void follow(std::vector<int32_t> text) { text_ = std::move(text); }
  void set_drafts(int64_t count) override { inner_->set_drafts(count); }
  int64_t max_drafts() const override { return inner_->max_drafts(); }
  int64_t full() const { return full_; }
  int64_t steps() const { return steps_; }

 private:
  void accept_some(const SequenceView& view, DraftTree& tree) const {
    if (text_.empty()) return;
    tree.clear(view.tokens.back());
    const int64_t root = view.root_position();
    for (int64_t d = 1; d <= std::min(root % 4, view.max_depth); ++d)
      if (root + d < static_cast<int64_t>(text_.size())) tree.add(static_cast<int>(d) - 1, text_[root + d]);
  }

  std::unique_ptr<Drafter> inner_;
  Check check_;
  std::vector<int32_t> text_;
  std::vector<float> values_;
  Tensor hidden_;
  int64_t full_ = 0, steps_ = 0;
};

int32_t best_token(const Context& ctx, const Model& model, const Tensor& hidden) {
  std::vector<float> logits(model.vocabulary());
  int32_t best = -1;
  model.logits(ctx, hidden, Tensor(logits.data(), DType::f32, {1, model.vocabulary()}));
  kernels::argmax(ctx, Tensor(logits.data(), DType::f32, {1, model.vocabulary()}),
                  Tensor(&best, DType::i32, {1}));
  return best;
}

void expect_chain(const DraftTree& tree, const std::vector<int32_t>& expected) {
  ASSERT_LE(tree.drafts(), static_cast<int>(expected.size()));
  for (int node = 1; node < tree.size(); ++node) {
    EXPECT_EQ(tree.parent(node), node - 1);
    EXPECT_EQ(tree.token(node), expected[static_cast<size_t>(node) - 1]) << "draft " << node;
  }
}

// The best tokens below a node as the Medusa heads of a model rank them.
class MedusaReference {
 public:
  explicit MedusaReference(const Model& model) : model_(model) {}

  // Of a head, with the tokens from the root to the node; hidden is the row before the root.
  std::vector<int32_t> ranked(const Context& ctx, std::vector<int32_t> path, const Tensor& hidden) const {
    const int64_t head = static_cast<int64_t>(path.size()) - 1, vocabulary = model_.vocabulary();
    std::vector<float> row(model_.width()), logits(vocabulary);
    std::vector<int32_t> ranked(vocabulary);
    const Tensor out(row.data(), DType::f32, {1, model_.width()});
    const Tensor values(logits.data(), DType::f32, {1, vocabulary});
    model_.medusa_hidden(ctx, head, hidden, Tensor(path.data(), DType::i32, {1, head + 1}), out);
    model_.logits(ctx, out, values, head);
    kernels::top_k(ctx, values, Tensor(ranked.data(), DType::i32, {1, vocabulary}));
    return ranked;
  }

  // Every draft is the best of its head that no sibling before it has taken.
  void check(const Context& ctx, const Tensor& hidden, const DraftTree& tree) {
    for (int node = 0; node < tree.size(); ++node) {
      std::vector<int32_t> path, below;
      for (int n = node; n >= 0; n = tree.parent(n)) path.insert(path.begin(), tree.token(n));
      for (int n = node + 1; n < tree.size(); ++n)
        if (tree.parent(n) == node) below.push_back(tree.token(n));
      if (below.empty()) continue;
      const std::vector<int32_t> expected = ranked(ctx, path, hidden);
      EXPECT_TRUE(std::equal(below.begin(), below.end(), expected.begin())) << "below node " << node;
      deepest_ = std::max(deepest_, tree.depth(node) + 1);
      path.back() = (path.back() + 1) % static_cast<int32_t>(model_.vocabulary());
      depends_ += ranked(ctx, path, hidden)[0] != expected[0];
    }
  }
  int deepest() const { return deepest_; }
  // Nodes whose best draft another token in their own place would have changed.
  int64_t depends() const { return depends_; }

 private:
  const Model& model_;
  int deepest_ = 0;
  int64_t depends_ = 0;
};

TEST(Drafters, MedusaProposesTheBestOfEachHead) {
  const Context ctx;
  for (const bool sequential : {false, true})
    for (const char* name : {"medusa", "medusa_tree"}) {
      TinyOptions options;
      options.medusa_sequential = sequential;
      const auto model = tiny_model(options);
      Decoder decoder(ctx, *model, 1, 256);
      configs::DecodeConfig config = model->config().decode;
      config.tree_nodes = 24;
      MedusaReference reference(*model);
      CheckedDrafter checked(
          make_drafter(decoder, name, config), *model,
          [&](const Context& inner, const std::vector<int32_t>&, const Tensor& hidden,
              const DraftTree& tree) { reference.check(inner, hidden.slice(hidden.rows() - 1, 1), tree); });
      const std::vector<std::vector<int32_t>> prompts = {random_tokens(40, 5)};
      DecodeSettings settings;
      settings.max_tokens = 100;
      decoder.run(prompts, settings, &checked);
      EXPECT_EQ(reference.deepest(), 3) << name;
      if (sequential)
        EXPECT_GT(reference.depends(), checked.steps()) << name;
      else
        EXPECT_EQ(reference.depends(), 0) << name;
      // A chain fills every level; a tree has fewer levels where the text ends or folds.
      if (std::string(name) == "medusa") {
        EXPECT_EQ(checked.full(), checked.steps());
      }
    }
}

// From a root on, in the middle of a chunk of the prefill or at the beginning of one.
TEST(Drafters, MedusaProbeCountsWhatTheHeadsSayOfTheText) {
  const Context ctx;
  TinyOptions options;
  options.medusa_sequential = true;
  const auto model = tiny_model(options);
  Decoder decoder(ctx, *model, 1, 256);
  const MedusaReference reference(*model);
  const std::vector<int32_t> prompt = random_tokens(90, 5);
  for (const int64_t from : {0, 40, 64, 65, 80}) {
    std::vector<std::vector<double>> hits(3, std::vector<double>(MedusaProbe::kRanks));
    // Row i of head k stands before the root i + 1 and token i + k + 2; the last one is what the model wrote.
    const auto count = [&](const Context& inner, const std::vector<int32_t>& text, const Tensor& hidden,
                           const DraftTree&) {
      const int64_t size = static_cast<int64_t>(text.size()), begin = std::max<int64_t>(0, from - 1);
      for (int64_t k = 0; k < 3; ++k)
        for (int64_t i = begin; i + k + 2 < size; ++i) {
          const auto first = text.begin() + i + 1;
          const auto ranked = reference.ranked(inner, {first, first + k + 1}, hidden.slice(i, 1));
          const auto rank = std::find(ranked.begin(), ranked.end(), first[k + 1]) - ranked.begin();
          if (rank < MedusaProbe::kRanks) hits[k][rank] += 1.0 / static_cast<double>(size - k - 2 - begin);
        }
    };
    CheckedDrafter counting(make_drafter(decoder, "medusa", model->config().decode), *model, count);
    MedusaProbe probe(ctx, *model);
    probe.count_from(from);
    DecodeSettings settings;
    settings.max_tokens = 2;
    decoder.run({&prompt, 1}, settings, &counting);
    ASSERT_EQ(counting.steps(), 1);
    settings.max_tokens = 1;
    decoder.run({&prompt, 1}, settings, &probe);
    const auto acceptance = probe.acceptance();
    for (size_t k = 0; k < 3; ++k)
      for (size_t r = 0; r < hits[k].size(); ++r)
        EXPECT_NEAR(acceptance[k][r], hits[k][r], 1e-12)
            << "head " << k << ", rank " << r << ", from " << from;
  }
}

// Hidden states of every depth over a whole text, from new states: rows 0 to the last one, whose output
// predicts the next draft.
class MtpReference {
 public:
  MtpReference(const Model& model, int64_t depths) : model_(model), depths_(depths) {}

  std::vector<int32_t> drafts(const Context& ctx, std::vector<int32_t> text, const Tensor& trunk,
                              int64_t count) {
    const int64_t rows = trunk.rows();
    std::vector<int32_t> drafts;
    std::vector<std::vector<float>> memory;
    Tensor hidden = trunk;
    for (int64_t draft = 1; draft <= count; ++draft) {
      const bool beyond = draft > depths_;
      // Past the last depth its own outputs stand in for the inputs of further rows.
      Tensor inputs = hidden;
      if (beyond) {
        memory.emplace_back(last_inputs_.begin(), last_inputs_.end());
        memory.back().insert(memory.back().end(), hidden.slice(hidden.rows() - 1, 1).as<float>(),
                             hidden.slice(hidden.rows() - 1, 1).as<float>() + model_.width());
        inputs = over(memory.back());
      }
      last_inputs_.assign(inputs.as<float>(), inputs.as<float>() + inputs.numel());
      const int64_t depth = std::min(draft, depths_);
      memory.emplace_back(inputs.numel());
      const Tensor out = over(memory.back());
      run(ctx, depth, std::span(text).subspan(depth, inputs.rows()), inputs, out);
      drafts.push_back(best_token(ctx, model_, out.slice(out.rows() - 1, 1)));
      text.push_back(drafts.back());
      hidden = out;
    }
    EXPECT_EQ(trunk.rows(), rows);
    return drafts;
  }

 private:
  Tensor over(std::vector<float>& values) const {
    return Tensor(values.data(), DType::f32,
                  {static_cast<int64_t>(values.size()) / model_.width(), model_.width()});
  }
  void run(const Context& ctx, int64_t depth, std::span<const int32_t> tokens, const Tensor& inputs,
           Tensor out) {
    DecodeState state = model_.make_mtp_state(ctx, 1, 512);
    StepRows step({}, 1);
    for (int64_t at = 0; at < inputs.rows();) {
      const int64_t n = std::min(rows_before_fold(at), inputs.rows() - at);
      step.clear();
      step.add_chain(at, tokens.subspan(at, n));
      model_.decode_mtp(ctx, depth, step.tokens(), inputs.slice(at, n), step.rows(), state, out.slice(at, n));
      step.accept_first(0, n);
      state.commit(ctx, step.path());
      at += n;
    }
  }

  const Model& model_;
  int64_t depths_;
  std::vector<float> last_inputs_;
};

TEST(Drafters, MtpProposesWhatItsDepthsSayOfTheWholeText) {
  const Context ctx;
  for (const int64_t depths : {1, 2, 3})
    for (const char* attention : {"linear", "softmax"}) {
      TinyOptions options;
      options.mtp = depths;
      options.attention = attention;
      const auto model = tiny_model(options);
      Decoder decoder(ctx, *model, 1, 256);
      MtpReference reference(*model, depths);
      CheckedDrafter checked(
          make_drafter(decoder, "mtp", model->config().decode), *model,
          [&](const Context& inner, const std::vector<int32_t>& text, const Tensor& hidden,
              const DraftTree& tree) { expect_chain(tree, reference.drafts(inner, text, hidden, 4)); });
      const std::vector<std::vector<int32_t>> prompts = {random_tokens(50, 5)};
      DecodeSettings settings;
      settings.max_tokens = 100;
      const DecodedSequence plain = decoder.run(prompts, settings, &checked).sequences[0];
      // With one depth only the trunk's fold ends a proposal; deeper ones also stop at their own.
      EXPECT_GE(checked.full(), checked.steps() - (depths == 1 ? 0 : 3 * 4)) << depths << " " << attention;
      const int64_t steps = checked.steps();
      std::vector<int32_t> text = prompts[0];
      text.insert(text.end(), plain.tokens.begin(), plain.tokens.end());
      checked.follow(text);
      EXPECT_EQ(decoder.run(prompts, settings, &checked).sequences[0].tokens, plain.tokens);
      EXPECT_LT(checked.steps() - steps, 60);
    }
}

void expect_tokens_of_every_drafter(const Model& model, int64_t batch) {
  const std::vector<std::vector<int32_t>> prompts = {random_tokens(20, 5), random_tokens(9, 6)};
  Decoder decoder({}, model, batch, 256);
  for (const char* name : {"medusa", "medusa_tree", "mtp"})
    for (const Acceptance rule : {Acceptance::greedy, Acceptance::rejection, Acceptance::typical}) {
      const auto drafter = make_drafter(decoder, name, model.config().decode);
      DecodeSettings settings;
      settings.max_tokens = 70;
      settings.acceptance = rule;
      settings.temperature = rule == Acceptance::greedy ? 0 : 1;
      const DecodeRun run = decoder.run(std::span(prompts).first(batch), settings, drafter.get());
      for (const DecodedSequence& sequence : run.sequences) {
        EXPECT_EQ(sequence.tokens.size(), 70u);
        for (const int32_t token : sequence.tokens)
          ASSERT_TRUE(token >= 0 && token < model.vocabulary()) << name << " " << to_string(rule);
      }
    }
}

// A model that has diverged has nothing to draw drafts from, and its text is still made of tokens.
TEST(Drafters, OfAModelOfNaNProposeTokensOrNothing) {
  TinyOptions options;
  options.mtp = 2;
  options.sharpness = std::numeric_limits<double>::quiet_NaN();
  for (const bool sequential : {false, true}) {
    options.medusa_sequential = sequential;
    const auto model = tiny_model(options);
    for (const int64_t batch : {1, 2}) expect_tokens_of_every_drafter(*model, batch);
  }
}

}  // namespace
}  // namespace trainer

// What the learned drafters propose equals what their heads say when everything is computed afresh from the
// text.
#include <gtest/gtest.h>

#include <algorithm>

#include "kernels/ops/sampling.h"
#include "tests/trainer/decode_model.h"
#include "trainer/decode/decoder.h"
#include "trainer/decode/step_rows.h"

namespace trainer {
namespace {

using decode_test::random_tokens;
using decode_test::tiny_model;
using decode_test::TinyOptions;

// Hands everything on to a drafter, keeps the hidden states of the text, and compares each proposal with
// `expected`.
class CheckedDrafter : public Drafter {
 public:
  // The drafts for a text whose last token is the root; hidden (rows of the text before it, C).
  using Expected =
      std::function<std::vector<int32_t>(const Context&, std::vector<int32_t>, const Tensor& hidden)>;
  CheckedDrafter(std::unique_ptr<Drafter> inner, const Model& model, Expected expected)
      : inner_(std::move(inner)),
        expected_(std::move(expected)),
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
    const auto expected = expected_(ctx, text, hidden_.slice(0, views[0].root_position()));
    std::vector<int32_t> proposed;
    for (int node = 1; node < trees[0].size(); ++node) proposed.push_back(trees[0].token(node));
    const int64_t wanted = std::min({max_drafts(), views[0].max_depth, views[0].max_drafts});
    ASSERT_LE(proposed.size(), expected.size());
    EXPECT_TRUE(std::equal(proposed.begin(), proposed.end(), expected.begin())) << "root " << text.size() - 1;
    accept_some(views[0], trees[0]);
    full_ += static_cast<int64_t>(proposed.size()) == wanted;
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
  Expected expected_;
  std::vector<int32_t> text_;
  std::vector<float> values_;
  Tensor hidden_;
  int64_t full_ = 0, steps_ = 0;
};

int32_t best_token(const Context& ctx, const Model& model, const Tensor& hidden, int64_t medusa_head = -1) {
  std::vector<float> logits(model.vocabulary());
  int32_t best = -1;
  model.logits(ctx, hidden, Tensor(logits.data(), DType::f32, {1, model.vocabulary()}), medusa_head);
  kernels::argmax(ctx, Tensor(logits.data(), DType::f32, {1, model.vocabulary()}),
                  Tensor(&best, DType::i32, {1}));
  return best;
}

TEST(Drafters, MedusaProposesEachHeadsBest) {
  const Context ctx;
  const auto model = tiny_model({});
  Decoder decoder(ctx, *model, 1, 256);
  CheckedDrafter checked(make_drafter(decoder, "medusa", model->config().decode), *model,
                         [&](const Context& inner, const std::vector<int32_t>&, const Tensor& hidden) {
                           std::vector<int32_t> drafts;
                           std::vector<float> row(model->width());
                           const Tensor out(row.data(), DType::f32, {1, model->width()});
                           for (int64_t k = 0; k < 3; ++k) {
                             model->medusa_hidden(inner, k, hidden.slice(hidden.rows() - 1, 1), out);
                             drafts.push_back(best_token(inner, *model, out));
                           }
                           return drafts;
                         });
  const std::vector<std::vector<int32_t>> prompts = {random_tokens(40, 5)};
  DecodeSettings settings;
  settings.max_tokens = 120;
  decoder.run(prompts, settings, &checked);
  EXPECT_EQ(checked.full(), checked.steps());
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
      CheckedDrafter checked(make_drafter(decoder, "mtp", model->config().decode), *model,
                             [&](const Context& inner, const std::vector<int32_t>& text,
                                 const Tensor& hidden) { return reference.drafts(inner, text, hidden, 4); });
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

}  // namespace
}  // namespace trainer

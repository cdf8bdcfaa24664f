#include "trainer/decode/drafters/medusa.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/ops/cast.h"
#include "kernels/ops/linear.h"
#include "kernels/ops/sampling.h"

namespace trainer {

namespace {

constexpr int64_t kTreeRanks = 10;  // candidates of a level; wider trees gain nothing

// Before anything is measured: each head a little worse than the one before, each rank much less likely.
std::vector<std::vector<double>> prior_acceptance(int64_t heads, int64_t ranks) {
  std::vector<std::vector<double>> acceptance(heads, std::vector<double>(ranks));
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t r = 0; r < ranks; ++r)
      acceptance[h][r] = 0.6 * std::pow(0.85, static_cast<double>(h)) * std::pow(0.3, static_cast<double>(r));
  return acceptance;
}

TreeShape chain_shape(int64_t drafts) {
  TreeShape shape;
  for (int64_t i = 0; i < drafts; ++i) {
    shape.parents.push_back(static_cast<int32_t>(i) - 1);
    shape.ranks.push_back(0);
    shape.depths.push_back(static_cast<int32_t>(i) + 1);
    shape.values.push_back(1);
  }
  return shape;
}

}  // namespace

MedusaDrafter::MedusaDrafter(const Context& ctx, const Model& model, const DrafterParams& params, Kind kind)
    : model_(model),
      kind_(kind),
      batch_(params.batch),
      heads_(std::min(model.config().heads.medusa, kernels::kMaxDecodeRows / params.batch)),
      own_vocabulary_(model.config().heads.medusa_vocabulary == "own"),
      memory_("drafter", ctx.device),
      top_(ctx.device, DType::i32, {heads_ * batch_ * std::min(kTreeRanks, model.vocabulary())}),
      replay_(model.config().train.graph) {
  max_drafts_ = kind == Kind::chain ? std::min(params.max_drafts, heads_) : params.tree_nodes;
  drafts_ = max_drafts_;
  if (kind == Kind::chain)
    shape_ = chain_shape(max_drafts_);
  else
    calibrate(prior_acceptance(heads_, kTreeRanks));
  allocate(ctx);
}

void MedusaDrafter::allocate(const Context& ctx) {
  const int64_t rows = heads_ * batch_, ranks = std::min(kTreeRanks, model_.vocabulary());
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1) memory_.place();
    last_hidden_ = memory_.allocate("last hidden", model_.parameters().compute(), {batch_, model_.width()});
    hidden_ = memory_.allocate("head hidden", model_.parameters().compute(), {rows, model_.width()});
    logits_ = memory_.allocate("head logits", DType::f32, {rows, model_.vocabulary()});
    q_ = memory_.allocate("head probabilities", DType::f32, {rows, model_.vocabulary()});
  }
  candidates_.resize(rows * ranks);
  left_.resize(model_.vocabulary());
  nodes_.resize(kernels::kMaxDecodeRows);
  reset(ctx);
}

void MedusaDrafter::reset(const Context& ctx) { kernels::fill(ctx, last_hidden_, 0.0f); }

void MedusaDrafter::set_drafts(int64_t count) { drafts_ = std::clamp<int64_t>(count, 0, max_drafts_); }

void MedusaDrafter::calibrate(const std::vector<std::vector<double>>& acceptance) {
  if (kind_ == Kind::chain) return;
  auto levels = acceptance;
  levels.resize(std::min<size_t>(levels.size(), heads_));
  for (auto& level : levels)
    level.resize(std::min<size_t>(
        {level.size(), static_cast<size_t>(kTreeRanks), static_cast<size_t>(model_.vocabulary())}));
  shape_ = best_tree(levels, static_cast<int>(max_drafts_));
  width_ = 1 + (shape_.size() ? *std::max_element(shape_.ranks.begin(), shape_.ranks.end()) : 0);
}

std::vector<double> MedusaDrafter::node_values() const {
  return kind_ == Kind::tree ? shape_.values : std::vector<double>{};
}

void MedusaDrafter::observe(const Context& ctx, int64_t sequence, const SequenceView&, const Tensor& hidden,
                            std::span<const int32_t> rows, int64_t) {
  copy_on_device(ctx, hidden.slice(rows.back(), 1), last_hidden_.slice(sequence, 1));
}

void MedusaDrafter::head_logits(const Context& ctx, int64_t levels) {
  for (int64_t k = 0; k < levels; ++k) {
    const Tensor rows = hidden_.slice(k * batch_, batch_);
    model_.medusa_hidden(ctx, k, last_hidden_, rows);
    if (own_vocabulary_) model_.logits(ctx, rows, logits_.slice(k * batch_, batch_), k);
  }
  if (!own_vocabulary_)
    model_.logits(ctx, hidden_.slice(0, levels * batch_), logits_.slice(0, levels * batch_));
}

void MedusaDrafter::rank_candidates(const Context& ctx, int64_t levels) {
  const int64_t rows = levels * batch_;
  const Tensor flat = top_.tensor().slice(0, rows * width_);
  replay_(ctx, {levels, width_, 0, 0}, [&] {
    head_logits(ctx, levels);
    const Tensor logits = logits_.slice(0, rows);
    if (width_ == 1)
      kernels::argmax(ctx, logits, flat);
    else
      kernels::top_k(ctx, logits, flat.view({rows, width_}));
  });
  kernels::synchronize(ctx.device, ctx.stream);
  std::copy_n(top_.data<int32_t>(), rows * width_, candidates_.begin());
}

// Candidates of a level are drawn without replacement: rank r from q without the ranks before it.
void MedusaDrafter::draw_candidates(const Context& ctx, int64_t levels,
                                    std::span<const SequenceView> sequences, double temperature) {
  const int64_t rows = levels * batch_, vocabulary = model_.vocabulary();
  const float t = static_cast<float>(temperature);
  replay_(ctx, {levels, 0, std::bit_cast<int32_t>(t), 0}, [&] {
    head_logits(ctx, levels);
    kernels::probabilities(ctx, logits_.slice(0, rows), t, q_.slice(0, rows));
  });
  q_host_.send(ctx, q_.slice(0, rows));
  kernels::synchronize(ctx.device, ctx.stream);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t level = row / batch_, b = row % batch_;
    const float* weights = q_host_.data<float>() + row * vocabulary;
    for (int64_t rank = 0; rank < width_; ++rank) {
      const float u =
          sequences[b].key.draft(sequences[b].root_position() + level + 1, static_cast<int>(rank));
      int32_t token = draw_index(weights, vocabulary, u);
      if (weights[token] <= 0) token = -1;
      candidate(level, b, rank) = token;
      if (rank + 1 == width_ || token < 0) continue;
      if (rank == 0) {
        std::copy_n(weights, vocabulary, left_.data());
        weights = left_.data();
      }
      left_[token] = 0;
    }
  }
}

void MedusaDrafter::grow(const SequenceView& view, int64_t sequence, int64_t levels, bool sampled,
                         DraftTree& tree) {
  const int64_t vocabulary = model_.vocabulary();
  for (int i = 0; i < std::min<int64_t>(drafts_, shape_.size()); ++i) {
    nodes_[i] = -1;
    const int64_t level = shape_.depths[i] - 1;
    if (level >= levels || level >= view.max_depth || tree.drafts() >= view.max_drafts) continue;
    const int parent = shape_.parents[i] < 0 ? 0 : nodes_[shape_.parents[i]];
    const int32_t token = candidate(level, sequence, shape_.ranks[i]);
    if (parent < 0 || token < 0) continue;
    const float* q = sampled ? q_host_.data<float>() + (level * batch_ + sequence) * vocabulary : nullptr;
    nodes_[i] = tree.add(parent, token, q);
  }
}

void MedusaDrafter::propose(const Context& ctx, std::span<const SequenceView> sequences,
                            const DraftSettings& settings, std::span<DraftTree> trees) {
  int64_t deepest = 0, wanted = 0;
  for (const SequenceView& view : sequences)
    if (view.active) deepest = std::max(deepest, std::min(view.max_depth, view.max_drafts));
  for (int i = 0; i < std::min<int64_t>(drafts_, shape_.size()); ++i)
    wanted = std::max<int64_t>(wanted, shape_.depths[i]);
  const int64_t levels = std::min({heads_, deepest, wanted});
  if (levels == 0) return;
  if (settings.sample)
    draw_candidates(ctx, levels, sequences, settings.temperature);
  else
    rank_candidates(ctx, levels);
  for (size_t b = 0; b < sequences.size(); ++b)
    if (sequences[b].active) grow(sequences[b], static_cast<int64_t>(b), levels, settings.sample, trees[b]);
}

}  // namespace trainer

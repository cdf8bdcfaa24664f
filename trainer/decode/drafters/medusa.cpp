#include "trainer/decode/drafters/medusa.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/ops/cast.h"
#include "kernels/ops/embedding.h"
#include "kernels/ops/linear.h"
#include "kernels/ops/sampling.h"
#include "kernels/ops/speculation.h"

namespace trainer {

namespace {

constexpr int64_t kTreeRanks = 10;           // candidates of a row; wider trees gain nothing
constexpr int kLeftOut = -1, kPlanned = -2;  // drafts of the shape that have no node, or none yet

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
      sequential_(model.config().heads.medusa_sequential),
      leads_on_(sequential_ && kind == Kind::chain && params.batch == 1),
      own_vocabulary_(model.config().heads.medusa_vocabulary == "own"),
      batch_(params.batch),
      heads_(std::min(model.config().heads.medusa, kernels::kMaxDecodeRows / params.batch)),
      max_drafts_(kind == Kind::chain ? std::min(params.max_drafts, heads_) : params.tree_nodes),
      drafts_(max_drafts_),
      most_rows_(std::min(kernels::kMaxDecodeRows, batch_ * max_drafts_)),
      memory_("drafter", ctx.device),
      asked_(ctx.device, DType::i32, {most_rows_ * (1 + heads_)}),
      top_(ctx.device, DType::i32, {1 + most_rows_ * std::min(kTreeRanks, model.vocabulary())}),
      chances_(ctx.device, DType::f32, {most_rows_ * std::min(kTreeRanks, model.vocabulary())}),
      rows_(most_rows_),
      candidates_(most_rows_ * std::min(kTreeRanks, model.vocabulary())),
      replay_(model.config().train.graph),
      nodes_(batch_ * kMaxDrafts),
      below_(batch_ * kMaxDrafts) {
  if (kind == Kind::chain)
    shape_ = chain_shape(max_drafts_);
  else
    calibrate(prior_acceptance(heads_, kTreeRanks));
  allocate(ctx);
}

void MedusaDrafter::allocate(const Context& ctx) {
  const DType compute = model_.parameters().compute();
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1) memory_.place();
    last_hidden_ = memory_.allocate("last hidden", compute, {batch_, model_.width()});
    if (sequential_) inputs_ = memory_.allocate("head inputs", compute, {most_rows_, model_.width()});
    hidden_ = memory_.allocate("head hidden", compute, {most_rows_, model_.width()});
    logits_ = memory_.allocate("head logits", DType::f32, {most_rows_, model_.vocabulary()});
    q_ = memory_.allocate("head probabilities", DType::f32, {most_rows_, model_.vocabulary()});
  }
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

// Which drafts of the shape a step has room for, best first; returns how many levels they have.
int64_t MedusaDrafter::plan(std::span<const SequenceView> sequences) {
  int64_t levels = 0;
  for (size_t b = 0; b < sequences.size(); ++b) {
    const SequenceView& view = sequences[b];
    int64_t room = view.active ? std::min(drafts_, view.max_drafts) : 0;
    for (int i = 0; i < shape_.size(); ++i) {
      const bool planned = i < drafts_ && room > 0 && shape_.depths[i] <= std::min(heads_, view.max_depth);
      node(static_cast<int64_t>(b), i) = planned ? kPlanned : kLeftOut;
      if (!planned) continue;
      --room;
      levels = std::max<int64_t>(levels, shape_.depths[i]);
    }
  }
  return levels;
}

// Gives every node that has drafts planned below it a row. Siblings come in order of their ranks, so the
// first of them has rank 0. Heads that are not sequential know all levels from one row a sequence, and those
// of a chain that leads on have one a level.
MedusaDrafter::Pass MedusaDrafter::begin_pass(int64_t level, int64_t levels, int64_t first,
                                              std::span<const DraftTree> trees) {
  const bool by_level = sequential_ && !leads_on_;
  Pass pass{level, by_level ? 1 : levels, first, by_level ? 0 : levels * batch_};
  for (int64_t row = 0; row < pass.rows; ++row) rows_[row] = {row % batch_, row / batch_};
  if (leads_on_) top_.tensor().as<int32_t>()[0] = trees[0].token(0);
  for (int64_t b = 0; b < static_cast<int64_t>(trees.size()); ++b)
    for (int i = 0; i < shape_.size(); ++i) {
      if (node(b, i) != kPlanned) continue;
      if (!by_level) {
        row_below(b, i) = (shape_.depths[i] - 1) * batch_ + b;
      } else if (shape_.depths[i] == level + 1 && shape_.ranks[i] == 0) {
        const bool asked = ask(first + pass.rows, level, first, b, parent_node(b, i), trees[b]);
        row_below(b, i) = asked ? first + pass.rows++ : -1;
      }
    }
  return pass;
}

// Writes down what the head of a level reads for the drafts below a node; false where the node has been left
// out or there are no more rows.
bool MedusaDrafter::ask(int64_t row, int64_t level, int64_t first, int64_t sequence, int node,
                        const DraftTree& tree) {
  if (node < 0 || row >= most_rows_) return false;
  rows_[row] = {sequence, level};
  int32_t* asked = asked_.tensor().as<int32_t>();
  asked[row - first] = static_cast<int32_t>(sequence);
  int32_t* tokens = asked + most_rows_ + (row - first) * (level + 1);
  for (int64_t d = level; d >= 0; --d, node = tree.parent(node)) tokens[d] = tree.token(node);
  return true;
}

// Logits of levels [begin, end) of a pass.
void MedusaDrafter::head_logits(const Context& ctx, const Pass& pass, int64_t begin, int64_t end) {
  const Tensor asked = asked_.tensor();
  Tensor inputs = last_hidden_, tokens;
  if (leads_on_) {
    tokens = top_.tensor().slice(0, begin + 1).view({1, begin + 1});
  } else if (sequential_) {
    inputs = inputs_.slice(0, pass.rows);
    kernels::embedding(ctx, asked.slice(0, pass.rows), last_hidden_, {}, {}, inputs);
    tokens = asked.slice(most_rows_, pass.rows * (pass.level + 1)).view({pass.rows, pass.level + 1});
  }
  const int64_t count = inputs.rows();
  for (int64_t k = begin; k < end; ++k) {
    const Tensor rows = hidden_.slice(k * count, count);
    model_.medusa_hidden(ctx, pass.level + k, inputs, tokens, rows);
    if (own_vocabulary_) model_.logits(ctx, rows, logits_.slice(k * count, count), pass.level + k);
  }
  const int64_t first = begin * count, rows = (end - begin) * count;
  if (!own_vocabulary_) model_.logits(ctx, hidden_.slice(first, rows), logits_.slice(first, rows));
}

// Of rows [first, first + rows) of a pass the likeliest candidates or, where drafts are sampled, candidates
// drawn without replacement.
void MedusaDrafter::choose(const Context& ctx, const Pass& pass, int64_t first, int64_t rows,
                           const DraftSettings& settings) {
  const Tensor logits = logits_.slice(first, rows), q = q_.slice(pass.first + first, rows);
  const Tensor flat = top_.tensor().slice(1 + first * width_, rows * width_);
  const Tensor chances = chances_.tensor().slice(first * width_, rows * width_);
  if (settings.sample) {
    kernels::probabilities(ctx, logits, static_cast<float>(settings.temperature), q);
    kernels::draw(ctx, q, chances.view({rows, width_}), flat.view({rows, width_}));
  } else if (width_ == 1) {
    kernels::argmax(ctx, logits, flat);
  } else {
    kernels::top_k(ctx, logits, flat.view({rows, width_}));
  }
}

// All levels at once, or one after another where each reads the candidates of the one before.
void MedusaDrafter::find_candidates(const Context& ctx, const Pass& pass,
                                    std::span<const SequenceView> sequences, const DraftSettings& settings) {
  if (settings.sample) take_chances(pass, sequences);
  const float temperature = settings.sample ? static_cast<float>(settings.temperature) : 0;
  const int64_t at_once = leads_on_ ? 1 : pass.levels, rows = pass.rows / pass.levels * at_once;
  replay_(ctx, {pass.level, pass.rows, width_, pass.first, std::bit_cast<int32_t>(temperature)}, [&] {
    for (int64_t k = 0; k < pass.levels; k += at_once) {
      head_logits(ctx, pass, k, k + at_once);
      choose(ctx, pass, k * rows, rows, settings);
    }
  });
  kernels::synchronize(ctx.device, ctx.stream);
  std::copy_n(top_.data<int32_t>() + 1, pass.rows * width_, candidates_.begin() + pass.first * width_);
}

// The random numbers that draw the candidates of a pass.
void MedusaDrafter::take_chances(const Pass& pass, std::span<const SequenceView> sequences) {
  for (int64_t i = 0; i < pass.rows; ++i) {
    const Row& row = rows_[pass.first + i];
    const SequenceView& view = sequences[row.sequence];
    for (int64_t rank = 0; rank < width_; ++rank)
      chances_.tensor().as<float>()[i * width_ + rank] =
          view.key.draft(view.root_position() + row.level + 1, static_cast<int>(rank));
  }
}

void MedusaDrafter::grow(const Pass& pass, int64_t sequence, bool sampled, DraftTree& tree) {
  for (int i = 0; i < shape_.size(); ++i) {
    int& drafted = node(sequence, i);
    const int64_t level = shape_.depths[i] - 1;
    if (drafted != kPlanned || level < pass.level || level >= pass.level + pass.levels) continue;
    const int parent = parent_node(sequence, i);
    const int64_t row = row_below(sequence, i);
    drafted = kLeftOut;
    if (parent < 0 || row < 0) continue;
    const int32_t token = candidates_[row * width_ + shape_.ranks[i]];
    if (token >= 0) drafted = tree.add(parent, token, sampled ? q_.slice(row, 1).as<float>() : nullptr, i);
  }
}

void MedusaDrafter::propose(const Context& ctx, std::span<const SequenceView> sequences,
                            const DraftSettings& settings, std::span<DraftTree> trees) {
  const int64_t levels = plan(sequences);
  int64_t first = 0;
  for (int64_t level = 0; level < levels;) {
    const Pass pass = begin_pass(level, levels, first, trees);
    if (pass.rows == 0) return;
    find_candidates(ctx, pass, sequences, settings);
    for (size_t b = 0; b < sequences.size(); ++b)
      grow(pass, static_cast<int64_t>(b), settings.sample, trees[b]);
    level += pass.levels;
    first += pass.rows;
  }
}

}  // namespace trainer

#include "trainer/model/transformer.h"

#include <fmt/format.h>

#include <optional>

#include "kernels/core/error.h"
#include "kernels/ops/embedding.h"

namespace trainer {

Transformer::Transformer(ParameterStore& store, const configs::Config& config, int64_t vocabulary)
    : store_(store) {
  const configs::ModelConfig& model = config.model;
  embedding_ = store.add("embedding.weight", {vocabulary, model.width}, {Init::Kind::normal});
  if (model.position == "learned")
    positions_ = store.add("position_embedding.weight", {model.context, model.width}, {Init::Kind::normal});
  if (model.embedding_norm) embedding_norm_.emplace(store, model, "embedding_norm");
  const std::vector<std::string> kinds = configs::attention_per_layer(model);
  for (size_t i = 0; i < kinds.size(); ++i)
    blocks_.emplace_back(store, config, kinds[i], "blocks." + std::to_string(i));
  final_norm_ = Norm(store, model, "final_norm");
}

int64_t Transformer::begin(int parameter) const {
  return store_.parameters()[static_cast<size_t>(parameter)].begin;
}

void Transformer::embed(const Context& ctx, const Tensor& tokens, const RowPlan& plan, Tensor x, Saved& saved,
                        kernels::Arena& arena) const {
  saved.embedded = x;
  if (embedding_norm_) {
    saved.embedded = arena.allocate("embedded", x.dtype, x.shape);
    saved.embedded_statistics = embedding_norm_->allocate_statistics(arena, x.rows());
  }
  kernels::embedding(ctx, tokens, store_.weight(embedding_), plan.positions,
                     positions_ >= 0 ? store_.weight(positions_) : Tensor{}, saved.embedded);
  if (embedding_norm_) embedding_norm_->forward(ctx, saved.embedded, x, saved.embedded_statistics);
}

void Transformer::forward(const Context& ctx, const Tensor& tokens, const RowPlan& plan, States* states,
                          Tensor hidden, Saved* saved, kernels::Arena& arena) const {
  std::optional<kernels::ArenaScope> passing_through;
  if (!saved) passing_through.emplace(arena);
  const auto allocate_x = [&] { return arena.allocate("x", hidden.dtype, hidden.shape); };
  Tensor x = allocate_x();
  const Tensor statistics = final_norm_.allocate_statistics(arena, hidden.rows());
  Saved passing;
  embed(ctx, tokens, plan, x, saved ? *saved : passing, arena);
  if (saved) {
    saved->x = {x};
    saved->blocks.resize(blocks_.size());
  }
  for (size_t i = 0; i < blocks_.size(); ++i) {
    AttentionState* state = states ? (*states)[i].get() : nullptr;
    if (saved) {
      const Tensor y = allocate_x();
      blocks_[i].forward(ctx, x, plan, state, y, saved->blocks[i], arena);
      saved->x.push_back(x = y);
    } else {
      const kernels::ArenaScope scope(arena);
      Block::Saved passing;
      blocks_[i].forward(ctx, x, plan, state, x, passing, arena);
    }
  }
  final_norm_.forward(ctx, x, hidden, statistics);
  if (saved) saved->statistics = statistics;
}

Tensor Transformer::embedded_gradient(const Context& ctx, const Saved& saved, const Tensor& d) const {
  if (!embedding_norm_) return d;
  const Tensor dembedded = ctx.scratch->allocate("dembedded", d.dtype, d.shape);
  embedding_norm_->backward(ctx, d, saved.embedded, saved.embedded_statistics, dembedded, false);
  return dembedded;
}

void Transformer::backward(const Context& ctx, const Tensor& tokens, const RowPlan& plan, const Saved& saved,
                           const Tensor& dhidden, FinalGradients& final) const {
  const kernels::ArenaScope scope(*ctx.scratch);
  const Tensor d = ctx.scratch->allocate("dx", dhidden.dtype, dhidden.shape);
  const Block& first = blocks_.front();
  const Tensor dexpanded = saved.blocks.front().mlp.like_expanded(*ctx.scratch);
  final_norm_.backward(ctx, dhidden, saved.x.back(), saved.statistics, d, false);
  final.from(begin(final_norm_.first_parameter()));
  for (size_t i = blocks_.size(); --i > 0;) {
    blocks_[i].backward(ctx, saved.x[i], plan, saved.blocks[i], d, dexpanded);
    blocks_[i].backward_expansion(ctx, saved.blocks[i], dexpanded);
    final.from(begin(blocks_[i].first_parameter()));
  }
  first.backward(ctx, saved.x.front(), plan, saved.blocks.front(), d, dexpanded);
  final.from(begin(first.last_matrix()));
  const Tensor dembedded = embedded_gradient(ctx, saved, d);
  kernels::embedding_backward(ctx, dembedded, tokens, store_.gradient(embedding_), {}, {});
  final.part(0, begin(embedding_ + 1));
  first.backward_expansion(ctx, saved.blocks.front(), dexpanded);
  if (positions_ >= 0)
    kernels::embedding_backward(ctx, dembedded, plan.positions, store_.gradient(positions_), {}, {});
  final.part(begin(embedding_ + 1), begin(first.last_matrix()));
}

Transformer::States Transformer::make_states(const Context& ctx, int64_t batch, int64_t capacity) const {
  if (positions_ >= 0) {
    const int64_t context = store_.parameters()[static_cast<size_t>(positions_)].shape[0];
    if (capacity > context)
      throw kernels::ConfigError(
          fmt::format("learned positions end at model.context = {}, and {} are needed; ask for fewer tokens",
                      context, capacity));
  }
  States states;
  for (const Block& block : blocks_) states.push_back(block.make_state(ctx, batch, capacity));
  return states;
}

void Transformer::pack(const Context& ctx, kernels::Arena& panels) {
  for (Block& block : blocks_) block.pack(ctx, panels);
}

int64_t Transformer::weight_bytes() const {
  int64_t bytes = 0;
  for (const Block& block : blocks_) bytes += block.weight_bytes();
  return bytes;
}

}  // namespace trainer

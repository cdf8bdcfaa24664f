#include "trainer/model/heads/mtp.h"

#include <fmt/format.h>

#include "kernels/ops/embedding.h"

namespace trainer {

namespace {
Linear add_projection(ParameterStore& store, int64_t width, const std::string& prefix) {
  const int id = store.add(prefix + ".projection.weight", {width, 2 * width}, {Init::Kind::normal});
  return Linear(store, id, id);
}
}  // namespace

Mtp::Mtp(ParameterStore& store, const configs::Config& config, int64_t depth, int embedding)
    : Head(fmt::format("mtp.{}", depth), depth),
      store_(store),
      embedding_(embedding),
      token_norm_(store, config.model, name() + ".token_norm"),
      hidden_norm_(store, config.model, name() + ".hidden_norm"),
      projection_(add_projection(store, config.model.width, name())),
      block_(store, config, "softmax", name() + ".block"),
      final_norm_(store, config.model, name() + ".final_norm") {}

void Mtp::depth(const Context& ctx, const HeadInput& in, AttentionState* state, Tensor out, Saved& saved,
                kernels::Arena& arena) const {
  const int64_t n = in.hidden.rows(), c = in.hidden.cols();
  const DType dtype = in.hidden.dtype;
  saved.embedded = arena.allocate("mtp embedded", dtype, {n, c});
  saved.joined = arena.allocate("mtp joined", dtype, {n, 2 * c});
  saved.token_statistics = token_norm_.allocate_statistics(arena, n);
  saved.hidden_statistics = hidden_norm_.allocate_statistics(arena, n);
  saved.final_statistics = final_norm_.allocate_statistics(arena, n);
  saved.block_in = arena.allocate("mtp block in", dtype, {n, c});
  saved.block_out = arena.allocate("mtp block out", dtype, {n, c});

  kernels::embedding(ctx, in.tokens, store_.weight(embedding_), {}, {}, saved.embedded);
  token_norm_.forward(ctx, saved.embedded, saved.joined.columns(0, c), saved.token_statistics);
  hidden_norm_.forward(ctx, in.hidden, saved.joined.columns(c, c), saved.hidden_statistics);
  projection_.forward(ctx, saved.joined, saved.block_in, in.plan.decoding());
  block_.forward(ctx, saved.block_in, in.plan, state, saved.block_out, saved.block, arena);
  final_norm_.forward(ctx, saved.block_out, out, saved.final_statistics);
}

std::unique_ptr<HeadSaved> Mtp::forward(const Context& ctx, const HeadInput& in, Tensor out,
                                        kernels::Arena& arena) const {
  auto saved = std::make_unique<Saved>();
  depth(ctx, in, nullptr, out, *saved, arena);
  return saved;
}

void Mtp::backward(const Context& ctx, const HeadInput& in, const HeadSaved& base, Tensor d,
                   Tensor dhidden) const {
  const auto& saved = static_cast<const Saved&>(base);
  const int64_t c = d.cols();
  const kernels::ArenaScope scope(*ctx.scratch);
  const Tensor dblock = ctx.scratch->allocate("mtp dblock", d.dtype, d.shape);
  final_norm_.backward(ctx, d, saved.block_out, saved.final_statistics, dblock, false);
  {
    const kernels::ArenaScope in_block(*ctx.scratch);
    const Tensor dexpanded = saved.block.mlp.like_expanded(*ctx.scratch);
    block_.backward(ctx, saved.block_in, in.plan, saved.block, dblock, dexpanded);
    block_.backward_expansion(ctx, saved.block, dexpanded);
  }
  const Tensor djoined = ctx.scratch->allocate("mtp djoined", d.dtype, saved.joined.shape);
  projection_.backward_weight(ctx, dblock, saved.joined);
  projection_.backward_input(ctx, dblock, djoined);

  // d is free from here on.
  token_norm_.backward(ctx, djoined.columns(0, c), saved.embedded, saved.token_statistics, d, false);
  if (store_.parameters()[static_cast<size_t>(embedding_)].trainable)
    kernels::embedding_backward(ctx, d, in.tokens, store_.gradient(embedding_), {}, {});
  hidden_norm_.backward(ctx, djoined.columns(c, c), in.hidden, saved.hidden_statistics, dhidden ? dhidden : d,
                        static_cast<bool>(dhidden));
}

std::unique_ptr<AttentionState> Mtp::make_state(const Context& ctx, int64_t batch, int64_t capacity) const {
  return block_.make_state(ctx, batch, capacity);
}

void Mtp::pack(const Context& ctx, kernels::Arena& panels) {
  projection_.pack(ctx, panels);
  block_.pack(ctx, panels);
}

}  // namespace trainer

#include "trainer/model/heads/medusa.h"

#include <fmt/format.h>

#include "kernels/ops/activation.h"
#include "kernels/ops/embedding.h"

namespace trainer {

Medusa::Medusa(ParameterStore& store, const configs::Config& config, int64_t index, int64_t vocabulary,
               int embedding, int unembedding)
    : Head(fmt::format("medusa.{}", index), index + 1),
      store_(store),
      embedding_(embedding),
      sequential_(config.heads.medusa_sequential),
      first_(static_cast<int>(store.parameters().size())),
      own_(config.heads.medusa_vocabulary == "own") {
  const int64_t width = config.model.width;
  if (sequential_) {
    const int between = store.add(name() + ".tokens.weight", {width, offset() * width}, {});
    between_ = Linear(store, between, between);
    token_norm_ = Norm(store, config.model, name() + ".tokens.norm");
  }
  for (int64_t i = 0; i < config.heads.medusa_layers; ++i) {
    const int weight = store.add(fmt::format("{}.layers.{}.weight", name(), i), {width, width}, {});
    const int bias = store.add(fmt::format("{}.layers.{}.bias", name(), i), {width}, {});
    layers_.emplace_back(store, weight, weight, bias);
  }
  if (!own_) return;
  const int own = store.add(name() + ".vocabulary.weight", {vocabulary, width},
                            {.kind = Init::Kind::copy, .source = unembedding});
  vocabulary_ = Linear(store, own, own);
}

void Medusa::layers(const Context& ctx, const Tensor& hidden, Tensor out, Saved& saved, kernels::Arena& arena,
                    bool rows_alone) const {
  Tensor x = hidden;
  if (sequential_) {
    x = arena.allocate("medusa joined", hidden.dtype, hidden.shape);
    token_norm_.forward(ctx, each_token(saved.embedded), each_token(saved.between), saved.statistics);
    between_.forward_add(ctx, saved.between, hidden, x, rows_alone);
  }
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Tensor u = arena.allocate("medusa u", x.dtype, x.shape);
    const Tensor y = i + 1 == layers_.size() ? out : arena.allocate("medusa x", x.dtype, x.shape);
    layers_[i].forward(ctx, x, u, rows_alone);
    kernels::silu_add(ctx, x, u, y);
    saved.x[i] = x;
    saved.u[i] = u;
    x = y;
  }
}

std::unique_ptr<HeadSaved> Medusa::forward(const Context& ctx, const HeadInput& in, Tensor out,
                                           kernels::Arena& arena) const {
  auto saved = std::make_unique<Saved>();
  if (sequential_) {
    const int64_t n = in.hidden.rows(), c = in.hidden.cols();
    allocate_between(arena, in.hidden, *saved);
    for (int64_t j = 0; j < offset(); ++j)
      kernels::embedding(ctx, in.tokens.slice(j, 1).view({n}), store_.weight(embedding_), {}, {},
                         saved->embedded.columns(j * c, c));
  }
  layers(ctx, in.hidden, out, *saved, arena, false);
  return saved;
}

void Medusa::decode(const Context& ctx, const Tensor& hidden, const Tensor& tokens, Tensor out) const {
  const kernels::ArenaScope scope(*ctx.scratch);
  Saved passing;
  if (sequential_) {
    const int64_t rows = hidden.rows() * offset();
    allocate_between(*ctx.scratch, hidden, passing);
    kernels::embedding(ctx, tokens.view({rows}), store_.weight(embedding_), {}, {},
                       each_token(passing.embedded));
  }
  layers(ctx, hidden, out, passing, *ctx.scratch, true);
}

void Medusa::allocate_between(kernels::Arena& arena, const Tensor& hidden, Saved& saved) const {
  for (Tensor* t : {&saved.embedded, &saved.between})
    *t = arena.allocate("medusa tokens", hidden.dtype, {hidden.rows(), offset() * hidden.cols()});
  saved.statistics = token_norm_.allocate_statistics(arena, hidden.rows() * offset());
}

Tensor Medusa::each_token(const Tensor& t) const {
  return t.view({t.rows() * offset(), t.cols() / offset()});
}

void Medusa::backward(const Context& ctx, const HeadInput& in, const HeadSaved& base, Tensor d,
                      Tensor dhidden) const {
  const auto& saved = static_cast<const Saved&>(base);
  const kernels::ArenaScope scope(*ctx.scratch);
  const Tensor du = ctx.scratch->allocate("medusa du", d.dtype, d.shape);
  for (size_t i = layers_.size(); i-- > 0;) {
    kernels::silu_add_backward(ctx, d, saved.u[i], du);
    layers_[i].backward_weight(ctx, du, saved.x[i]);
    if (i > 0 || dhidden || sequential_) layers_[i].backward_input(ctx, du, d, true);
  }
  if (dhidden) kernels::add(ctx, dhidden, d, dhidden);
  if (sequential_) backward_tokens(ctx, in.tokens, saved, d);
}

void Medusa::backward_tokens(const Context& ctx, const Tensor& tokens, const Saved& saved,
                             const Tensor& dz) const {
  const kernels::ArenaScope scope(*ctx.scratch);
  const int64_t n = dz.rows(), c = dz.cols();
  const Tensor dbetween = ctx.scratch->allocate("medusa dtokens", dz.dtype, saved.between.shape);
  const Tensor dembedded = ctx.scratch->allocate("medusa dtokens", dz.dtype, saved.between.shape);
  between_.backward_weight(ctx, dz, saved.between);
  between_.backward_input(ctx, dz, dbetween);
  token_norm_.backward(ctx, each_token(dbetween), each_token(saved.embedded), saved.statistics,
                       each_token(dembedded), false);
  if (!store_.parameters()[static_cast<size_t>(embedding_)].trainable) return;
  for (int64_t j = 0; j < offset(); ++j)
    kernels::embedding_backward(ctx, dembedded.columns(j * c, c), tokens.slice(j, 1).view({n}),
                                store_.gradient(embedding_), {}, {});
}

void Medusa::pack(const Context& ctx, kernels::Arena& panels) {
  if (sequential_) between_.pack(ctx, panels);
  for (Linear& layer : layers_) layer.pack(ctx, panels);
  if (own_) vocabulary_.pack(ctx, panels);
}

}  // namespace trainer

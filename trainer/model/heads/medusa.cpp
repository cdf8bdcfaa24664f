#include "trainer/model/heads/medusa.h"

#include <fmt/format.h>

#include "kernels/ops/activation.h"

namespace trainer {

Medusa::Medusa(ParameterStore& store, const configs::Config& config, int64_t index, int64_t vocabulary,
               int unembedding)
    : Head(fmt::format("medusa.{}", index), index + 1),
      first_(static_cast<int>(store.parameters().size())),
      own_(config.heads.medusa_vocabulary == "own") {
  const int64_t width = config.model.width;
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
  layers(ctx, in.hidden, out, *saved, arena, false);
  return saved;
}

void Medusa::backward(const Context& ctx, const HeadInput&, const HeadSaved& base, Tensor d,
                      Tensor dhidden) const {
  const auto& saved = static_cast<const Saved&>(base);
  const kernels::ArenaScope scope(*ctx.scratch);
  const Tensor du = ctx.scratch->allocate("medusa du", d.dtype, d.shape);
  for (size_t i = layers_.size(); i-- > 0;) {
    kernels::silu_add_backward(ctx, d, saved.u[i], du);
    layers_[i].backward_weight(ctx, du, saved.x[i]);
    if (i > 0 || dhidden) layers_[i].backward_input(ctx, du, d, true);
  }
  if (dhidden) kernels::add(ctx, dhidden, d, dhidden);
}

void Medusa::pack(const Context& ctx, kernels::Arena& panels) {
  for (Linear& layer : layers_) layer.pack(ctx, panels);
  if (own_) vocabulary_.pack(ctx, panels);
}

}  // namespace trainer

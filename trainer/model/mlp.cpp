#include "trainer/model/mlp.h"

#include "kernels/ops/activation.h"

namespace trainer {

Mlp::Mlp(ParameterStore& store, const configs::ModelConfig& model, const std::string& prefix, float deviation)
    : gated_(model.mlp == "swiglu") {
  const Shape expanding{model.ffn_width, model.width};
  int first = -1;
  if (gated_) first = store.add(prefix + ".gate.weight", expanding, {Init::Kind::normal});
  const int up = store.add(prefix + ".up.weight", expanding, {Init::Kind::normal}, gated_);
  int first_bias = -1, up_bias = -1;
  if (model.bias) {
    if (gated_) first_bias = store.add(prefix + ".gate.bias", {model.ffn_width}, {});
    up_bias = store.add(prefix + ".up.bias", {model.ffn_width}, {}, gated_);
  }
  expand_ = Linear(store, gated_ ? first : up, up, gated_ ? first_bias : up_bias, up_bias);
  const int down =
      store.add(prefix + ".down.weight", {model.width, model.ffn_width}, {Init::Kind::normal, deviation});
  down_ = Linear(store, down, down, model.bias ? store.add(prefix + ".down.bias", {model.width}, {}) : -1);
}

void Mlp::allocate(kernels::Arena& arena, DType dtype, int64_t rows, Saved& saved) const {
  saved.expanded = arena.allocate("mlp expanded", dtype, {rows, expand_.outputs()});
  saved.activated = arena.allocate("mlp activated", dtype, {rows, down_.inputs()});
}

void Mlp::forward(const Context& ctx, const LayerInput& x, const Tensor& residual, Tensor y, Saved& saved,
                  bool rows_alone) const {
  if (gated_) {
    expand_.forward(ctx, x, saved.expanded, rows_alone);
    kernels::swiglu(ctx, saved.expanded, saved.activated);
  } else {
    expand_.forward_gelu(ctx, x, rows_alone ? Tensor{} : saved.expanded, saved.activated, rows_alone);
  }
  down_.forward_add(ctx, saved.activated, residual, y, rows_alone);
}

void Mlp::backward(const Context& ctx, const Tensor& dy, const Saved& saved, Tensor dexpanded,
                   Tensor dx) const {
  const kernels::ArenaScope scope(*ctx.scratch);
  // Gradients of the layers above may start on their way to other ranks now, beside what follows. The small
  // sums give that exchange the time to take its multiprocessors before a product takes all of them. Then it
  // costs the product of many tiles little; one that takes every multiprocessor once, as the matrix's
  // gradient does, would take twice as long beside it.
  down_.backward_bias(ctx, dy);
  if (gated_) {
    const Tensor dactivated = ctx.scratch->allocate("mlp dactivated", dy.dtype, saved.activated.shape);
    down_.backward_input(ctx, dy, dactivated);
    kernels::swiglu_backward(ctx, dactivated, saved.expanded, dexpanded);
  } else {
    down_.backward_input_gelu(ctx, dy, saved.expanded, dexpanded);
  }
  down_.backward_matrix(ctx, dy, saved.activated);
  expand_.backward_input(ctx, dexpanded, dx);
}

void Mlp::pack(const Context& ctx, kernels::Arena& panels, const Norm& norm) {
  expand_.pack(ctx, panels, &norm);
  down_.pack(ctx, panels);
}

}  // namespace trainer

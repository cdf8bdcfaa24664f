#include "trainer/model/norm.h"

namespace trainer {

Norm::Norm(ParameterStore& store, const configs::ModelConfig& model, const std::string& prefix)
    : store_(&store) {
  const bool layer = model.norm == "layer";
  params_ = {.kind = layer ? kernels::NormKind::layer : kernels::NormKind::rms,
             .groups = 1,
             .eps = static_cast<float>(model.norm_eps)};
  gain_ = store.add(prefix + ".weight", {model.width}, {Init::Kind::ones});
  if (layer) bias_ = store.add(prefix + ".bias", {model.width}, {Init::Kind::zeros});
}

Norm Norm::per_head(ParameterStore& store, double eps, int64_t groups, int64_t size,
                    const std::string& prefix) {
  Norm norm;
  norm.store_ = &store;
  norm.params_ = {.kind = kernels::NormKind::rms, .groups = groups, .eps = static_cast<float>(eps)};
  norm.gain_ = store.add(prefix + ".weight", {groups * size}, {Init::Kind::ones});
  return norm;
}

Tensor LayerInput::computed(const Context& ctx) const {
  if (!norm) return x;
  norm->forward(ctx, x, normed, statistics);
  return normed;
}

Tensor Norm::allocate_statistics(kernels::Arena& arena, int64_t rows) const {
  return arena.allocate("norm statistics", kernels::main_dtype(store_->compute()), {rows, params_.groups, 2});
}

void Norm::forward(const Context& ctx, const Tensor& x, Tensor y, Tensor statistics) const {
  kernels::norm(ctx, params_, x, store_->weight(gain_), bias(), y, statistics);
}

void Norm::forward(const Context& ctx, const Tensor& residual, const Tensor& branch, Tensor sum, Tensor y,
                   Tensor statistics) const {
  kernels::residual_norm(ctx, params_, residual, branch, store_->weight(gain_), bias(), sum, y, statistics);
}

void Norm::backward(const Context& ctx, const Tensor& dy, const Tensor& x, const Tensor& statistics,
                    Tensor dx, bool accumulate) const {
  kernels::norm_backward(ctx, params_, dy, x, store_->weight(gain_), statistics, dx, accumulate,
                         store_->gradient(gain_), bias_ >= 0 ? store_->gradient(bias_) : Tensor{});
}

}  // namespace trainer

#include "trainer/model/linear.h"

#include <algorithm>

namespace trainer {

namespace {
// Calls fn(begin, count) for as many rows as a row-invariant kernel takes at a time, or for all at once.
template <typename Fn>
void for_parts(int64_t rows, bool rows_alone, Fn fn) {
  const int64_t most = rows_alone ? kernels::kMaxDecodeRows : rows;
  for (int64_t begin = 0; begin < rows; begin += most) fn(begin, std::min(most, rows - begin));
}
}  // namespace

Linear::Linear(ParameterStore& store, int first, int last, int bias, int last_bias)
    : store_(&store), first_(first), last_(last), bias_(bias), last_bias_(std::max(bias, last_bias)) {
  store.set_product(first, last, true);
}

int64_t Linear::outputs() const {
  int64_t rows = 0;
  for (int i = first_; i <= last_; ++i) rows += store_->parameters()[static_cast<size_t>(i)].shape[0];
  return rows;
}

int64_t Linear::inputs() const { return store_->parameters()[static_cast<size_t>(first_)].shape[1]; }

int64_t Linear::bytes() const {
  return outputs() * inputs() * static_cast<int64_t>(kernels::size_of(store_->compute()));
}

kernels::LinearWeight Linear::weight(bool rows_alone, const Norm* norm) const {
  kernels::LinearWeight w{store_->fused_weight(first_, last_), {}, {}};
  if (bias_ >= 0) w.bias = store_->fused_weight(bias_, last_bias_);
  if (!rows_alone) return w;
  if (!panels_) throw kernels::ShapeError("decoding needs packed weights: call prepare_decoding first");
  w.panels = panels_;
  if (norm) {
    norm->put_ahead(w);
    w.norm.sums = norm_sums_;
  }
  return w;
}

void Linear::forward(const Context& ctx, const LayerInput& in, Tensor y, bool rows_alone) const {
  const kernels::LinearWeight w = weight(rows_alone, in.norm);
  const Tensor x = rows_alone ? in.x : in.computed(ctx);
  for_parts(x.rows(), rows_alone, [&](int64_t begin, int64_t count) {
    kernels::linear(ctx, x.slice(begin, count), w, y.slice(begin, count));
  });
}

void Linear::forward_gelu(const Context& ctx, const LayerInput& in, Tensor pre, Tensor y,
                          bool rows_alone) const {
  const kernels::LinearWeight w = weight(rows_alone, in.norm);
  const Tensor x = rows_alone ? in.x : in.computed(ctx);
  for_parts(x.rows(), rows_alone, [&](int64_t begin, int64_t count) {
    kernels::linear_gelu(ctx, x.slice(begin, count), w, pre ? pre.slice(begin, count) : Tensor{},
                         y.slice(begin, count));
  });
}

void Linear::forward_add(const Context& ctx, const Tensor& x, const Tensor& residual, Tensor y,
                         bool rows_alone) const {
  const kernels::LinearWeight w = weight(rows_alone);
  for_parts(x.rows(), rows_alone, [&](int64_t begin, int64_t count) {
    kernels::linear_add(ctx, x.slice(begin, count), w, residual.slice(begin, count), y.slice(begin, count));
  });
}

void Linear::backward_input(const Context& ctx, const Tensor& dy, Tensor dx, bool accumulate) const {
  kernels::linear_backward_input(ctx, dy, store_->fused_weight(first_, last_), dx, accumulate);
}

void Linear::backward_input_gelu(const Context& ctx, const Tensor& dy, const Tensor& pre, Tensor dpre) const {
  kernels::linear_backward_input_gelu(ctx, dy, store_->fused_weight(first_, last_), pre, dpre);
}

void Linear::backward_weight(const Context& ctx, const Tensor& dy, const Tensor& x) const {
  backward_weight(ctx, dy, x, bias_gradient());
}

void Linear::backward_bias(const Context& ctx, const Tensor& dy) const {
  if (trainable() && bias_ >= 0) kernels::linear_backward_bias(ctx, dy, bias_gradient());
}

void Linear::backward_matrix(const Context& ctx, const Tensor& dy, const Tensor& x) const {
  backward_weight(ctx, dy, x, Tensor{});
}

void Linear::backward_weight(const Context& ctx, const Tensor& dy, const Tensor& x,
                             const Tensor& dbias) const {
  if (!trainable()) return;
  kernels::linear_backward_weight(ctx, dy, x, store_->fused_gradient(first_, last_), dbias,
                                  ctx.rehearsal || !store_->take_unwritten(first_, last_));
}

bool Linear::trainable() const { return store_->parameters()[static_cast<size_t>(first_)].trainable; }

Tensor Linear::bias_gradient() const {
  return bias_ >= 0 ? store_->fused_gradient(bias_, last_bias_) : Tensor{};
}

void Linear::pack(const Context& ctx, kernels::Arena& panels, const Norm* norm) {
  kernels::LinearWeight w{store_->fused_weight(first_, last_), {}, {}};
  panels_ = panels.allocate("panels", store_->compute(), kernels::panels_shape(w.matrix));
  if (!panels.measuring()) kernels::pack_panels(ctx, w.matrix, panels_);
  if (!norm || !ctx.device.is_cuda()) return;  // the CPU's norm is an operation of its own
  norm->put_ahead(w);
  if (bias_ >= 0) w.bias = store_->fused_weight(bias_, last_bias_);
  norm_sums_ = panels.allocate("norm sums", kernels::main_dtype(store_->compute()), {outputs(), 2});
  if (!panels.measuring()) kernels::pack_norm(ctx, w, norm_sums_);
}

}  // namespace trainer

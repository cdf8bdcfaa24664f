#pragma once
// A linear layer: views of one matrix, or of several consecutive ones seen as one, and perhaps of its bias.
#include "kernels/ops/linear.h"
#include "trainer/model/norm.h"

namespace trainer {

class Linear {
 public:
  Linear() = default;
  // bias -1: none; otherwise the first of the biases, and last_bias the last where there are several.
  Linear(ParameterStore& store, int first, int last, int bias = -1, int last_bias = -1);

  int first_parameter() const { return first_; }
  int64_t outputs() const;
  int64_t inputs() const;
  // A matrix product; or, with `rows_alone` and after pack(), each row computed as if it stood alone.
  // Rows alone have no backward: their norm need not be written.
  void forward(const Context& ctx, const LayerInput& in, Tensor y, bool rows_alone = false) const;
  // y = gelu(pre) of that product, which is written to `pre` unless it is empty.
  void forward_gelu(const Context& ctx, const LayerInput& in, Tensor pre, Tensor y,
                    bool rows_alone = false) const;
  // y = residual + that product; y is not the residual.
  void forward_add(const Context& ctx, const Tensor& x, const Tensor& residual, Tensor y,
                   bool rows_alone = false) const;
  // dx = dy W, or dx += dy W.
  void backward_input(const Context& ctx, const Tensor& dy, Tensor dx, bool accumulate = false) const;
  // dpre = (dy W) * gelu'(pre), for a layer behind forward_gelu.
  void backward_input_gelu(const Context& ctx, const Tensor& dy, const Tensor& pre, Tensor dpre) const;
  // Gradients of weight and bias (+=); nothing where they are frozen.
  void backward_weight(const Context& ctx, const Tensor& dy, const Tensor& x) const;
  // The same in two halves.
  void backward_bias(const Context& ctx, const Tensor& dy) const;
  void backward_matrix(const Context& ctx, const Tensor& dy, const Tensor& x) const;
  // Takes memory for the panels from `panels`, and packs them unless the arena is measuring; `norm` is the
  // one that the layer reads x through, if any.
  void pack(const Context& ctx, kernels::Arena& panels, const Norm* norm = nullptr);
  int64_t bytes() const;

 private:
  void backward_weight(const Context& ctx, const Tensor& dy, const Tensor& x, const Tensor& dbias) const;
  bool trainable() const;
  Tensor bias_gradient() const;
  kernels::LinearWeight weight(bool rows_alone, const Norm* norm = nullptr) const;

  ParameterStore* store_ = nullptr;
  int first_ = -1, last_ = -1, bias_ = -1, last_bias_ = -1;
  Tensor panels_, norm_sums_;
};

}  // namespace trainer

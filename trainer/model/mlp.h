#pragma once
// The feed-forward layer.
//   swiglu   y = W_down (silu(W_gate x) * W_up x)
//   gelu     y = W_down gelu(W_up x)
#include <string>

#include "configs/config.h"
#include "trainer/model/linear.h"

namespace trainer {

class Mlp {
 public:
  struct Saved {
    Tensor expanded;   // (N, 2F) gate and up, or (N, F)
    Tensor activated;  // (N, F)
    // Memory of the shape and type of `expanded`.
    Tensor like_expanded(kernels::Arena& arena) const {
      return arena.allocate("mlp dexpanded", expanded.dtype, expanded.shape);
    }
  };

  // `deviation` is that of the output projection's initial values.
  Mlp(ParameterStore& store, const configs::ModelConfig& model, const std::string& prefix, float deviation);
  void allocate(kernels::Arena& arena, DType dtype, int64_t rows, Saved& saved) const;
  // y = residual + mlp(x); y is not the residual.
  void forward(const Context& ctx, const LayerInput& x, const Tensor& residual, Tensor y, Saved& saved,
               bool rows_alone) const;
  // Writes dexpanded (shape of saved.expanded) and dx; backward_weight adds the rest of the gradients, those
  // of the matrix that reads x.
  void backward(const Context& ctx, const Tensor& dy, const Saved& saved, Tensor dexpanded, Tensor dx) const;
  void backward_weight(const Context& ctx, const Tensor& dexpanded, const Tensor& x) const {
    expand_.backward_weight(ctx, dexpanded, x);
  }
  // norm: the one that the layer reads x through.
  void pack(const Context& ctx, kernels::Arena& panels, const Norm& norm);
  int last_matrix() const { return down_.first_parameter(); }
  int64_t weight_bytes() const { return expand_.bytes() + down_.bytes(); }

 private:
  bool gated_;
  Linear expand_, down_;
};

}  // namespace trainer

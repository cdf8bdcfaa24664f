#pragma once
// A normalisation layer with its gain (and, for LayerNorm, its bias).
#include <string>

#include "configs/config.h"
#include "kernels/ops/linear.h"
#include "trainer/model/parameters.h"

namespace trainer {

class Norm;

// What a layer reads: a tensor, or the norm of one, which is computed with the layer.
struct LayerInput {
  LayerInput(const Tensor& x) : x(x) {}
  LayerInput(const Norm& norm, const Tensor& x, const Tensor& normed, const Tensor& statistics)
      : x(x), norm(&norm), normed(normed), statistics(statistics) {}
  // x, or its norm, written to `normed` and `statistics` as the backward needs them.
  Tensor computed(const Context& ctx) const;

  Tensor x;
  const Norm* norm = nullptr;
  Tensor normed, statistics;
};

class Norm {
 public:
  Norm() = default;
  // The model's kind over `width` columns.
  Norm(ParameterStore& store, const configs::ModelConfig& model, const std::string& prefix);
  // RMSNorm of each of `groups` groups of `size` columns.
  static Norm per_head(ParameterStore& store, double eps, int64_t groups, int64_t size,
                       const std::string& prefix);

  int first_parameter() const { return gain_; }
  Tensor allocate_statistics(kernels::Arena& arena, int64_t rows) const;  // (N, groups, 2)
  void forward(const Context& ctx, const Tensor& x, Tensor y, Tensor statistics) const;
  // Makes a layer read norm(x).
  void put_ahead(kernels::LinearWeight& w) const { w.norm = {params_, store_->weight(gain_), bias(), {}}; }
  // sum = residual + branch, y = norm(sum).
  void forward(const Context& ctx, const Tensor& residual, const Tensor& branch, Tensor sum, Tensor y,
               Tensor statistics) const;
  // dx written, or += when `accumulate`; gradients of gain and bias +=.
  void backward(const Context& ctx, const Tensor& dy, const Tensor& x, const Tensor& statistics, Tensor dx,
                bool accumulate) const;

 private:
  Tensor bias() const { return bias_ >= 0 ? store_->weight(bias_) : Tensor{}; }

  ParameterStore* store_ = nullptr;
  kernels::NormParams params_;
  int gain_ = -1, bias_ = -1;
};

}  // namespace trainer

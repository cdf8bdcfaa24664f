#include "kernels/ops/linear.h"

#include "kernels/cuda/bias.h"
#include "kernels/cuda/gemm.h"
#include "kernels/ops/activation.h"

namespace kernels::cuda {

void linear(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor y) {
  if (x.rows() == 0) return;
  Product product{.a = x, .b = w.matrix, .c = y, .transposed_b = true};
  if (!w.bias) {
    multiply(ctx, product);
    return;
  }
  // The library takes a bias of y's type alone, and not at every size.
  if (w.bias.dtype == y.dtype) {
    product.epilogue = Epilogue::bias;
    product.bias = w.bias;
    if (multiply(ctx, product)) return;
  }
  copy_to_rows(ctx, w.bias, y);
  multiply(ctx, {.a = x, .b = w.matrix, .c = y, .transposed_b = true, .accumulate = true});
}

namespace {
// The library's gelu errs by about 1e-5: below fp16's and bf16's rounding, above fp32's.
bool gelu_is_exact_enough(const Tensor& x) { return x.dtype != DType::f32; }
}  // namespace

void linear_gelu(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor pre, Tensor y) {
  if (x.rows() == 0) return;
  if (w.panels && x.rows() <= kMaxDecodeRows && !pre) return cuda::linear_rows(ctx, x, w, y, true);
  if (gelu_is_exact_enough(x) && (!w.panels || x.rows() > kMaxDecodeRows)) {
    const Product fused{.a = x,
                        .b = w.matrix,
                        .c = y,
                        .transposed_b = true,
                        .epilogue = Epilogue::gelu,
                        .bias = w.bias,
                        .aux = pre};
    if (multiply(ctx, fused)) return;
  }
  const Tensor sum = pre ? pre : y;
  kernels::linear(ctx, x, w, sum);
  kernels::gelu(ctx, sum, y);
}

void linear_add(const Context& ctx, const Tensor& x, const LinearWeight& w, const Tensor& residual,
                Tensor y) {
  if (x.rows() == 0) return;
  const Product fused{.a = x,
                      .b = w.matrix,
                      .c = y,
                      .transposed_b = true,
                      .epilogue = w.bias ? Epilogue::bias : Epilogue::none,
                      .bias = w.bias,
                      .addend = residual};
  if (multiply(ctx, fused)) return;
  cuda::linear(ctx, x, w, y);
  kernels::add(ctx, residual, y, y);
}

void linear_backward_input(const Context& ctx, const Tensor& dy, const Tensor& matrix, Tensor dx,
                           bool accumulate) {
  if (dy.rows() == 0) return;
  multiply(ctx, {.a = dy, .b = matrix, .c = dx, .accumulate = accumulate});
}

void linear_backward_input_gelu(const Context& ctx, const Tensor& dy, const Tensor& matrix, const Tensor& pre,
                                Tensor dpre) {
  if (dy.rows() == 0) return;
  if (gelu_is_exact_enough(dy) &&
      multiply(ctx, {.a = dy, .b = matrix, .c = dpre, .epilogue = Epilogue::gelu_gradient, .aux = pre}))
    return;
  cuda::linear_backward_input(ctx, dy, matrix, dpre, false);
  kernels::gelu_backward(ctx, dpre, pre, dpre);
}

void linear_backward_weight(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dw, Tensor dbias) {
  if (dy.rows() == 0) return;
  multiply(ctx, {.a = dy, .b = x, .c = dw, .transposed_a = true, .accumulate = true});
  if (dbias) add_column_sums(ctx, dy, dbias);
}

}  // namespace kernels::cuda

#include "kernels/ops/linear.h"

#include "kernels/cuda/bias.h"
#include "kernels/cuda/check.h"
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
  if (w.panels && x.rows() <= kMaxDecodeRows) return cuda::linear_rows(ctx, x, w, y, false, residual);
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

namespace {
// The shortest time in which the device can read a tensor.
float reading_milliseconds(const Context& ctx, const Tensor& t) {
  int kilohertz = 0, bits = 0;
  check(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, ctx.device.index), "asking a GPU");
  check(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, ctx.device.index), "asking a GPU");
  const float bytes_per_millisecond = 2.0f * static_cast<float>(kilohertz) * static_cast<float>(bits) / 8;
  return static_cast<float>(t.bytes()) / bytes_per_millisecond;
}

// Whether the product's own sums of dy's columns were measured to cost less than reading dy once more.
bool sums_pay(const Context& ctx, const Product& plain, const Product& summing) {
  if (summing.bias.numel() > kColumnSums) return false;
  const auto without = measured_milliseconds(ctx, plain), with = measured_milliseconds(ctx, summing);
  return without && with && *with - *without < reading_milliseconds(ctx, plain.a);
}
}  // namespace

void linear_backward_weight(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dw, Tensor dbias,
                            bool accumulate) {
  const Product plain{.a = dy, .b = x, .c = dw, .transposed_a = true, .accumulate = accumulate};
  if (dbias) {
    Product summing = plain;
    summing.epilogue = Epilogue::column_sums;
    summing.bias = Tensor(column_sums_memory(ctx), DType::f32, dbias.shape, dbias.device);
    if (sums_pay(ctx, plain, summing)) {
      multiply(ctx, summing);
      return kernels::add(ctx, dbias, summing.bias, dbias);
    }
    add_column_sums(ctx, dy, dbias);
  }
  multiply(ctx, plain);
}

void linear_backward_bias(const Context& ctx, const Tensor& dy, Tensor dbias) {
  add_column_sums(ctx, dy, dbias);
}

}  // namespace kernels::cuda

#include "kernels/ops/linear.h"

#include <atomic>

#include "kernels/ops/activation.h"
#include "kernels/ops/cast.h"

namespace kernels {

namespace {

void check_rows(const char* operation, const char* argument, const Tensor& given, int64_t rows,
                int64_t cols) {
  check_shape(operation, argument, given, Shape{rows, cols});
}

// Results of the forward may be kept in the main type.
void check_compute_or_main(const char* operation, const char* argument, const Tensor& given, DType compute) {
  if (given.dtype != main_dtype(compute)) check_dtype(operation, argument, given, compute);
}

void check_forward(const char* operation, const Tensor& x, const LinearWeight& w, const Tensor& y) {
  const int64_t out = w.matrix.rows(), in = w.matrix.cols();
  check_rows(operation, "x", x, x.rows(), in);
  check_rows(operation, "y", y, x.rows(), out);
  check_rows(operation, "matrix", w.matrix, out, in);
  check_dtype(operation, "matrix", w.matrix, x.dtype);
  check_compute_or_main(operation, "y", y, x.dtype);
  if (w.bias) {
    check_shape(operation, "bias", w.bias, Shape{out});
    check_dtype(operation, "bias", w.bias, x.dtype);
  }
  if (w.panels) {
    check_shape(operation, "panels", w.panels, panels_shape(w.matrix));
    check_dtype(operation, "panels", w.panels, x.dtype);
  }
  if (w.norm.gain) check_shape(operation, "norm.gain", w.norm.gain, Shape{in});
  if (w.norm.bias) check_shape(operation, "norm.bias", w.norm.bias, Shape{in});
  if (w.norm.sums) check_shape(operation, "norm.sums", w.norm.sums, Shape{out, 2});
}

void check_backward_input(const char* operation, const Tensor& dy, const Tensor& matrix, const Tensor& dx) {
  check_rows(operation, "dy", dy, dy.rows(), matrix.rows());
  check_rows(operation, "dx", dx, dy.rows(), matrix.cols());
  check_rows(operation, "matrix", matrix, matrix.rows(), matrix.cols());
  check_dtype(operation, "matrix", matrix, dy.dtype);
  check_compute_or_main(operation, "dx", dx, dy.dtype);
}

std::atomic<bool> measuring = true;

void check_bias_gradient(const char* operation, const Tensor& dy, const Tensor& dbias) {
  check_shape(operation, "dbias", dbias, Shape{dy.cols()});
  check_dtype(operation, "dbias", dbias, main_dtype(dy.dtype));
}

}  // namespace

Shape panels_shape(const Tensor& matrix) {
  const auto panels = [](int64_t size, int64_t panel) { return (size + panel - 1) / panel; };
  const int64_t out = matrix.dim(0), in = matrix.dim(1);
  if (matrix.device.is_cuda())
    return Shape{panels(out, cuda::kTileRows), panels(in, cuda::kTileColumns),
                 cuda::kTileRows * cuda::kTileColumns};
  return Shape{panels(out, cpu::kPanelRows), in, cpu::kPanelRows};
}

void pack_panels(const Context& ctx, const Tensor& matrix, Tensor& panels) {
  check_rows("pack_panels", "matrix", matrix, matrix.rows(), matrix.cols());
  check_shape("pack_panels", "panels", panels, panels_shape(matrix));
  check_dtype("pack_panels", "panels", panels, matrix.dtype);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::pack_panels(ctx, matrix, panels);
  return cpu::pack_panels(ctx, matrix, panels);
}

void pack_norm(const Context& ctx, const LinearWeight& w, Tensor& sums) {
  const int64_t out = w.matrix.rows(), in = w.matrix.cols();
  check_rows("pack_norm", "matrix", w.matrix, out, in);
  check_shape("pack_norm", "norm.gain", w.norm.gain, Shape{in});
  check_dtype("pack_norm", "norm.gain", w.norm.gain, w.matrix.dtype);
  if (w.norm.bias) {
    check_shape("pack_norm", "norm.bias", w.norm.bias, Shape{in});
    check_dtype("pack_norm", "norm.bias", w.norm.bias, w.matrix.dtype);
  }
  if (w.bias) {
    check_shape("pack_norm", "bias", w.bias, Shape{out});
    check_dtype("pack_norm", "bias", w.bias, w.matrix.dtype);
  }
  check_shape("pack_norm", "sums", sums, Shape{out, 2});
  check_dtype("pack_norm", "sums", sums, main_dtype(w.matrix.dtype));
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::pack_norm(ctx, w, sums);
  return cpu::pack_norm(ctx, w, sums);
}

bool computes_norm(Device device, const Tensor& x, const LinearWeight& w) {
  if constexpr (kCudaEnabled) return device.is_cuda() && cuda::linear_rows_norms(x, w);
  return false;
}

namespace {
// Calls layer(norm(x), w without the norm) and returns true where the norm is an operation of its own.
template <typename Layer>
bool with_norm_ahead(const Context& ctx, const Tensor& x, const LinearWeight& w, const Layer& layer) {
  if (!w.norm.gain || computes_norm(ctx.device, x, w)) return false;
  const ArenaScope scope(*ctx.scratch);
  const Tensor normed = ctx.scratch->allocate("normed", x.dtype, x.shape);
  norm(ctx, w.norm.params, x, w.norm.gain, w.norm.bias, normed, {});
  layer(normed, LinearWeight{w.matrix, w.bias, w.panels});
  return true;
}
}  // namespace

void linear(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor y) {
  check_forward("linear", x, w, y);
  if (with_norm_ahead(
          ctx, x, w, [&](const Tensor& normed, const LinearWeight& plain) { linear(ctx, normed, plain, y); }))
    return;
  if (ctx.rehearsal) return;
  const bool alone = w.panels && x.rows() <= kMaxDecodeRows;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return alone ? cuda::linear_rows(ctx, x, w, y) : cuda::linear(ctx, x, w, y);
  return alone ? cpu::linear_rows(ctx, x, w, y) : cpu::linear(ctx, x, w, y);
}

void linear_gelu(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor pre, Tensor y) {
  check_forward("linear_gelu", x, w, y);
  check_dtype("linear_gelu", "y", y, x.dtype);
  if (pre) {
    check_shape("linear_gelu", "pre", pre, y.shape);
    check_dtype("linear_gelu", "pre", pre, x.dtype);
  }
  if (with_norm_ahead(ctx, x, w, [&](const Tensor& normed, const LinearWeight& plain) {
        linear_gelu(ctx, normed, plain, pre, y);
      }))
    return;
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::linear_gelu(ctx, x, w, pre, y);
  return cpu::linear_gelu(ctx, x, w, pre, y);
}

void linear_add(const Context& ctx, const Tensor& x, const LinearWeight& w, const Tensor& residual,
                Tensor y) {
  check_forward("linear_add", x, w, y);
  check_dtype("linear_add", "y", y, x.dtype);
  check_shape("linear_add", "residual", residual, y.shape);
  check_dtype("linear_add", "residual", residual, x.dtype);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::linear_add(ctx, x, w, residual, y);
  linear(ctx, x, w, y);
  add(ctx, residual, y, y);
}

void linear_backward_input(const Context& ctx, const Tensor& dy, const Tensor& matrix, Tensor dx,
                           bool accumulate) {
  check_backward_input("linear_backward_input", dy, matrix, dx);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::linear_backward_input(ctx, dy, matrix, dx, accumulate);
  return cpu::linear_backward_input(ctx, dy, matrix, dx, accumulate);
}

void linear_backward_input_gelu(const Context& ctx, const Tensor& dy, const Tensor& matrix, const Tensor& pre,
                                Tensor dpre) {
  check_backward_input("linear_backward_input_gelu", dy, matrix, dpre);
  check_dtype("linear_backward_input_gelu", "dpre", dpre, dy.dtype);
  check_shape("linear_backward_input_gelu", "pre", pre, dpre.shape);
  check_dtype("linear_backward_input_gelu", "pre", pre, dy.dtype);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::linear_backward_input_gelu(ctx, dy, matrix, pre, dpre);
  return cpu::linear_backward_input_gelu(ctx, dy, matrix, pre, dpre);
}

void linear_backward_weight(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dw, Tensor dbias,
                            bool accumulate) {
  check_rows("linear_backward_weight", "dy", dy, x.rows(), dy.cols());
  check_rows("linear_backward_weight", "x", x, x.rows(), x.cols());
  check_rows("linear_backward_weight", "dw", dw, dy.cols(), x.cols());
  check_dtype("linear_backward_weight", "x", x, dy.dtype);
  check_dtype("linear_backward_weight", "dw", dw, main_dtype(dy.dtype));
  if (dbias) check_bias_gradient("linear_backward_weight", dy, dbias);
  if (ctx.rehearsal) return;
  if (dy.rows() == 0) {
    if (!accumulate) fill(ctx, dw, 0.0f);
    return;
  }
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::linear_backward_weight(ctx, dy, x, dw, dbias, accumulate);
  return cpu::linear_backward_weight(ctx, dy, x, dw, dbias, accumulate);
}

void linear_backward_bias(const Context& ctx, const Tensor& dy, Tensor dbias) {
  check_bias_gradient("linear_backward_bias", dy, dbias);
  if (ctx.rehearsal || dy.rows() == 0) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::linear_backward_bias(ctx, dy, dbias);
  return cpu::linear_backward_bias(ctx, dy, dbias);
}

void measure_products(bool on) { measuring = on; }
bool products_are_measured() { return measuring; }

size_t product_workspace_bytes(Device device) { return device.is_cuda() ? size_t{32} << 20 : 0; }

}  // namespace kernels

#include "kernels/ops/linear.h"

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

}  // namespace

Shape panels_shape(const Tensor& matrix) {
  return Shape{(matrix.dim(0) + kPanelRows - 1) / kPanelRows, matrix.dim(1), kPanelRows};
}

void pack_panels(const Context& ctx, const Tensor& matrix, Tensor& panels) {
  check_rows("pack_panels", "matrix", matrix, matrix.rows(), matrix.cols());
  check_shape("pack_panels", "panels", panels, panels_shape(matrix));
  check_dtype("pack_panels", "panels", panels, matrix.dtype);
  if (ctx.rehearsal) return;
  return cpu::pack_panels(ctx, matrix, panels);
}

void linear(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor y) {
  const int64_t out = w.matrix.rows(), in = w.matrix.cols();
  check_rows("linear", "x", x, x.rows(), in);
  check_rows("linear", "y", y, x.rows(), out);
  check_rows("linear", "matrix", w.matrix, out, in);
  check_dtype("linear", "matrix", w.matrix, x.dtype);
  check_compute_or_main("linear", "y", y, x.dtype);
  if (w.bias) {
    check_shape("linear", "bias", w.bias, Shape{out});
    check_dtype("linear", "bias", w.bias, x.dtype);
  }
  if (w.panels) {
    check_shape("linear", "panels", w.panels, panels_shape(w.matrix));
    check_dtype("linear", "panels", w.panels, x.dtype);
  }
  if (ctx.rehearsal) return;
  if (w.panels && x.rows() <= kMaxDecodeRows) return cpu::linear_rows(ctx, x, w, y);
  return cpu::linear(ctx, x, w, y);
}

void linear_backward_input(const Context& ctx, const Tensor& dy, const Tensor& matrix, Tensor dx,
                           bool accumulate) {
  check_rows("linear_backward_input", "dy", dy, dy.rows(), matrix.rows());
  check_rows("linear_backward_input", "dx", dx, dy.rows(), matrix.cols());
  check_rows("linear_backward_input", "matrix", matrix, matrix.rows(), matrix.cols());
  check_dtype("linear_backward_input", "matrix", matrix, dy.dtype);
  check_compute_or_main("linear_backward_input", "dx", dx, dy.dtype);
  if (ctx.rehearsal) return;
  return cpu::linear_backward_input(ctx, dy, matrix, dx, accumulate);
}

void linear_backward_weight(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dw, Tensor dbias) {
  check_rows("linear_backward_weight", "dy", dy, x.rows(), dy.cols());
  check_rows("linear_backward_weight", "x", x, x.rows(), x.cols());
  check_rows("linear_backward_weight", "dw", dw, dy.cols(), x.cols());
  check_dtype("linear_backward_weight", "x", x, dy.dtype);
  check_dtype("linear_backward_weight", "dw", dw, main_dtype(dy.dtype));
  if (dbias) {
    check_shape("linear_backward_weight", "dbias", dbias, Shape{dy.cols()});
    check_dtype("linear_backward_weight", "dbias", dbias, main_dtype(dy.dtype));
  }
  if (ctx.rehearsal) return;
  return cpu::linear_backward_weight(ctx, dy, x, dw, dbias);
}

}  // namespace kernels

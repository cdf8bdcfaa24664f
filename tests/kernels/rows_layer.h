#pragma once
// A linear layer as decoding runs it, on any device, and what its rows must fulfil there.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "kernels/ops/linear.h"
#include "tests/support/rehearsed.h"
#include "tests/support/tensor_buffer.h"

namespace rows_layer {

using kernels::Context;
using kernels::DType;
using kernels::Tensor;
using support::TensorBuffer;

// y = linear(x), gelu of it, its sum with a residual, or linear(norm(x)).
enum class Form { plain, gelu, add, norm };

struct RowsLayer {
  TensorBuffer matrix, bias, panels, gain, shift, sums;
  RowsLayer(const Context& ctx, DType dtype, int64_t out, int64_t in)
      : matrix(dtype, {out, in}, ctx.device),
        bias(dtype, {out}, ctx.device),
        gain(dtype, {in}, ctx.device),
        shift(dtype, {in}, ctx.device),
        sums(kernels::main_dtype(dtype), {out, 2}, ctx.device) {
    gain.fill_normal(6);
    shift.fill_normal(7);
    matrix.fill_normal(1, 0.2);
    bias.fill_normal(2);
    panels = TensorBuffer(dtype, kernels::panels_shape(matrix), ctx.device);
    pack(ctx);
  }
  void pack(const Context& ctx) {
    Tensor view = panels;
    kernels::pack_panels(ctx, matrix, view);
    view = sums;
    kernels::pack_norm(ctx, norm_weight(), view);
  }
  kernels::LinearWeight weight() const { return {matrix, bias, panels}; }
  kernels::LinearWeight norm_weight() const {
    kernels::LinearWeight w = weight();
    w.norm = {{.kind = kernels::NormKind::layer}, gain, shift, sums};
    return w;
  }
  void norm_linear(const Context& ctx, const Tensor& x, const Tensor& y) const {
    const kernels::LinearWeight w = norm_weight();
    support::run_rehearsed(ctx.device, ctx.stream, [&](const Context& c) { kernels::linear(c, x, w, y); });
  }
  // Bytes of y.
  std::vector<char> rows_of(const Context& ctx, const Tensor& x, DType y_type, Form form = Form::plain,
                            const Tensor& residual = {}) const {
    TensorBuffer y(y_type, {x.rows(), matrix.tensor().rows()}, ctx.device);
    if (form == Form::gelu)
      kernels::linear_gelu(ctx, x, weight(), {}, y);
    else if (form == Form::add)
      kernels::linear_add(ctx, x, weight(), residual, y);
    else if (form == Form::norm)
      norm_linear(ctx, x, y);
    else
      kernels::linear(ctx, x, weight(), y);
    return y.bytes();
  }
};

// Rows among any number of neighbours have the bits they have alone.
inline void expect_rows_alone(const Context& ctx, DType dtype, int64_t out, int64_t in, DType y_type,
                              Form form = Form::plain) {
  const RowsLayer layer(ctx, dtype, out, in);
  TensorBuffer x(dtype, {kernels::kMaxDecodeRows, in}, ctx.device),
      residual(dtype, {kernels::kMaxDecodeRows, out}, ctx.device);
  x.fill_normal(3);
  residual.fill_normal(4);
  const auto rows = [&](int64_t first, int64_t n) {
    return layer.rows_of(ctx, x.tensor().slice(first, n), y_type, form, residual.tensor().slice(first, n));
  };
  std::vector<char> alone;
  for (int64_t i = 0; i < kernels::kMaxDecodeRows; ++i) {
    const auto row = rows(i, 1);
    alone.insert(alone.end(), row.begin(), row.end());
  }
  const auto row_bytes = static_cast<int64_t>(alone.size()) / kernels::kMaxDecodeRows;
  for (int64_t n = 1; n <= kernels::kMaxDecodeRows; ++n) {
    const int64_t first = (n * 7) % (kernels::kMaxDecodeRows - n + 1);
    const auto together = rows(first, n);
    EXPECT_TRUE(std::equal(together.begin(), together.end(), alone.begin() + first * row_bytes))
        << n << " rows of (" << out << ", " << in << "), " << name_of(dtype);
  }
}

// A NaN changes its own row and no other.
inline void expect_nan_stays_in_its_row(const Context& ctx, DType dtype) {
  const RowsLayer layer(ctx, dtype, 64, 40);
  TensorBuffer x(dtype, {6, 40}, ctx.device);
  x.fill_normal(4);
  const auto clean = layer.rows_of(ctx, x, dtype);
  x.set(3 * 40 + 11, std::numeric_limits<double>::quiet_NaN());
  const auto dirty = layer.rows_of(ctx, x, dtype);
  const auto row_bytes = static_cast<int64_t>(clean.size()) / 6;
  for (int64_t row = 0; row < 6; ++row) {
    const auto begin = clean.begin() + row * row_bytes;
    EXPECT_EQ(std::equal(begin, begin + row_bytes, dirty.begin() + row * row_bytes), row != 3)
        << "row " << row << ", " << name_of(dtype);
  }
}

}  // namespace rows_layer

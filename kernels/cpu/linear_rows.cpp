#include <algorithm>

#include "kernels/core/parallel.h"
#include "kernels/cpu/convert.h"
#include "kernels/ops/linear.h"

namespace kernels::cpu {

namespace {

template <typename T>
void pack(const Tensor& matrix, const Tensor& panels) {
  const int64_t out = matrix.rows(), in = matrix.cols();
  parallel_for(panels.rows(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      T* panel = panels.as<T>() + p * panels.row_stride;
      const int64_t valid = std::min(kPanelRows, out - p * kPanelRows);
      const T* rows = matrix.as<T>() + p * kPanelRows * matrix.row_stride;
      for (int64_t i = 0; i < in; ++i)
        for (int64_t r = 0; r < kPanelRows; ++r)
          panel[i * kPanelRows + r] = r < valid ? rows[r * matrix.row_stride + i] : T{};
    }
  });
}

template <typename T, typename Y>
void plain_rows(const Tensor& x, const LinearWeight& w, const Tensor& y) {
  using A = acc_t<T>;
  const int64_t out = w.matrix.rows(), in = w.matrix.cols();
  parallel_for(w.panels.rows(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t valid = std::min(kPanelRows, out - p * kPanelRows);
      for (int64_t n = 0; n < x.rows(); ++n) {
        A sum[kPanelRows] = {}, weights[kPanelRows];
        for (int64_t i = 0; i < in; ++i) {
          load_row(w.panels.as<T>() + p * w.panels.row_stride + i * kPanelRows, weights, kPanelRows);
          const A value = x.as<T>()[n * x.row_stride + i];
          for (int64_t r = 0; r < kPanelRows; ++r) sum[r] += value * weights[r];
        }
        if (w.bias)
          for (int64_t r = 0; r < valid; ++r) sum[r] += static_cast<A>(w.bias.as<T>()[p * kPanelRows + r]);
        store_row(sum, y.as<Y>() + n * y.row_stride + p * kPanelRows, valid);
      }
    }
  });
}

}  // namespace

void pack_panels(const Context&, const Tensor& matrix, Tensor& panels) {
  visit_dtype(matrix.dtype, [&](auto tag) { pack<decltype(tag)>(matrix, panels); });
}

void linear_rows(const Context&, const Tensor& x, const LinearWeight& w, Tensor y) {
  visit_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (y.dtype == x.dtype) return plain_rows<T, T>(x, w, y);
    return plain_rows<T, acc_t<T>>(x, w, y);
  });
}

}  // namespace kernels::cpu

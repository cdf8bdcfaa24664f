#include "kernels/ops/linear.h"

#include <algorithm>

#include "kernels/core/parallel.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/gemm.h"
#include "kernels/ops/activation.h"

namespace kernels::cpu {

void linear(const Context&, const Tensor& x, const LinearWeight& w, Tensor y) {
  gemm({x}, {w.matrix, true}, w.bias, false, y);
}

void linear_gelu(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor pre, Tensor y) {
  const Tensor sum = pre ? pre : y;
  if (w.panels && x.rows() <= kMaxDecodeRows)
    cpu::linear_rows(ctx, x, w, sum);
  else
    cpu::linear(ctx, x, w, sum);
  cpu::gelu(ctx, sum, y);
}

void linear_backward_input_gelu(const Context& ctx, const Tensor& dy, const Tensor& matrix, const Tensor& pre,
                                Tensor dpre) {
  cpu::linear_backward_input(ctx, dy, matrix, dpre, false);
  cpu::gelu_backward(ctx, dpre, pre, dpre);
}

void linear_backward_input(const Context&, const Tensor& dy, const Tensor& matrix, Tensor dx,
                           bool accumulate) {
  gemm({dy}, {matrix}, {}, accumulate, dx);
}

namespace {

// Columns are split over threads; each is summed over rows in order, so that the sum is always the same.
template <typename T>
void add_column_sums(const Tensor& dy, const Tensor& sums) {
  using A = acc_t<T>;
  constexpr int64_t kColumns = 64;
  parallel_for(dy.cols(), kColumns, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kColumns) {
      const int64_t count = std::min(kColumns, end - first);
      A sum[kColumns] = {}, row[kColumns];
      for (int64_t i = 0; i < dy.rows(); ++i) {
        load_row(dy.as<T>() + i * dy.row_stride + first, row, count);
        for (int64_t j = 0; j < count; ++j) sum[j] += row[j];
      }
      for (int64_t j = 0; j < count; ++j) sums.as<A>()[first + j] += sum[j];
    }
  });
}

}  // namespace

void linear_backward_weight(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dw, Tensor dbias,
                            bool accumulate) {
  gemm({dy, true}, {x}, {}, accumulate, dw);
  if (dbias) cpu::linear_backward_bias(ctx, dy, dbias);
}

void linear_backward_bias(const Context&, const Tensor& dy, Tensor dbias) {
  visit_dtype(dy.dtype, [&](auto tag) { add_column_sums<decltype(tag)>(dy, dbias); });
}

}  // namespace kernels::cpu

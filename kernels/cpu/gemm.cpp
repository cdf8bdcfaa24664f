#include "kernels/cpu/gemm.h"

#include <vector>

#include "kernels/core/parallel.h"
#include "kernels/cpu/convert.h"

namespace kernels::cpu {

namespace {

template <typename T>
T element(const Operand& a, int64_t i, int64_t j) {
  return a.matrix.as<T>()[a.transposed ? j * a.matrix.row_stride + i : i * a.matrix.row_stride + j];
}

template <typename T, typename C>
void plain_gemm(const Operand& a, const Operand& b, const Tensor& bias, bool accumulate, const Tensor& c) {
  using A = acc_t<T>;
  const int64_t n = b.cols(), k = a.cols();
  parallel_for(a.rows(), 1, [&](int64_t begin, int64_t end) {
    std::vector<A> row(n), column(n);
    for (int64_t i = begin; i < end; ++i) {
      C* out = c.as<C>() + i * c.row_stride;
      for (int64_t j = 0; j < n; ++j)
        row[j] =
            (accumulate ? static_cast<A>(out[j]) : A{0}) + (bias ? static_cast<A>(bias.as<T>()[j]) : A{0});
      for (int64_t l = 0; l < k; ++l) {
        const A left = element<T>(a, i, l);
        if (b.transposed)
          for (int64_t j = 0; j < n; ++j) column[j] = element<T>(b, l, j);
        else
          load_row(b.matrix.as<T>() + l * b.matrix.row_stride, column.data(), n);
        for (int64_t j = 0; j < n; ++j) row[j] += left * column[j];
      }
      store_row(row.data(), out, n);
    }
  });
}

}  // namespace

void gemm(const Operand& a, const Operand& b, const Tensor& bias, bool accumulate, const Tensor& c) {
  visit_dtype(a.matrix.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (c.dtype == a.matrix.dtype) return plain_gemm<T, T>(a, b, bias, accumulate, c);
    return plain_gemm<T, acc_t<T>>(a, b, bias, accumulate, c);
  });
}

}  // namespace kernels::cpu

#include "kernels/cpu/gemm.h"

#include <dnnl.h>

#include <algorithm>

#include "kernels/core/parallel.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/gemm_amx.h"
#include "kernels/cpu/staging.h"

// From libgomp, which oneDNN is built with; its setting is per thread.
extern "C" void omp_set_num_threads(int);

namespace kernels::cpu {

namespace {

// Part of an operand in fp32, as stored: rows of `stride` numbers.
struct Block {
  const float* data;
  int64_t stride;
};

// c (m, n) += op(a) op(b), on the calling thread: the team of parallel.h is the only one.
void multiply(bool transposed_a, const Block& a, bool transposed_b, const Block& b, float* c, int64_t stride,
              int64_t m, int64_t n, int64_t k) {
  thread_local const bool alone = (omp_set_num_threads(1), true);
  (void)alone;
  const auto status = dnnl_sgemm(transposed_a ? 'T' : 'N', transposed_b ? 'T' : 'N', m, n, k, 1.0f, a.data,
                                 a.stride, b.data, b.stride, 1.0f, c, stride);
  if (status != dnnl_success) throw ShapeError("oneDNN refused a matrix product");
}

// Rows [first_row, +rows) and columns [first_col, +cols) of op(operand), in fp32. fp32 itself is used in
// place; other types are converted to `staging`.
template <typename T>
Block block_of(const Operand& o, int64_t first_row, int64_t rows, int64_t first_col, int64_t cols,
               Staging<float>& staging) {
  if (o.transposed) {
    std::swap(first_row, first_col);
    std::swap(rows, cols);
  }
  const T* source = o.matrix.as<T>() + first_row * o.matrix.row_stride + first_col;
  if constexpr (std::is_same_v<T, float>) return {source, o.matrix.row_stride};
  float* block = staging.get(static_cast<size_t>(rows * cols));
  for (int64_t i = 0; i < rows; ++i) load_row(source + i * o.matrix.row_stride, block + i * cols, cols);
  return {block, cols};
}

// As block_of, converted by the whole team.
template <typename T>
Block shared_block(const Operand& o, int64_t first_row, int64_t rows, Staging<float>& staging) {
  if constexpr (std::is_same_v<T, float>) return block_of<T>(o, first_row, rows, 0, o.cols(), staging);
  const int64_t lines = o.transposed ? o.matrix.rows() : rows, length = o.transposed ? rows : o.matrix.cols();
  const T* source = o.matrix.as<T>() + (o.transposed ? first_row : first_row * o.matrix.row_stride);
  float* block = staging.get(static_cast<size_t>(lines * length));
  parallel_for(lines, std::max<int64_t>(1, 16384 / length), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      load_row(source + i * o.matrix.row_stride, block + i * length, length);
  });
  return {block, length};
}

// What a block of c is before the product is added.
template <typename T, typename C>
void start_block(const Tensor& c, const Tensor& bias, bool keep, int64_t first, int64_t rows, float* out,
                 int64_t stride) {
  const int64_t n = c.cols();
  for (int64_t i = 0; i < rows; ++i) {
    float* row = out + i * stride;
    const C* old = c.as<C>() + (first + i) * c.row_stride;
    if (!keep)
      std::fill_n(row, n, 0.0f);
    else if (static_cast<const void*>(old) != row)
      load_row(old, row, n);
    if (bias)
      for (int64_t j = 0; j < n; ++j) row[j] += static_cast<float>(bias.as<T>()[j]);
  }
}

// Every block of c is one product of a fixed size, whichever thread computes it. One operand is converted
// once by all, the other block by block, so that it is still in cache when it is multiplied. A long sum into
// an fp32 c is cut, so that the shared operand stays in cache too.
template <typename T, typename C>
void blocked_gemm(const Operand& a, const Operand& b, const Tensor& bias, bool accumulate, const Tensor& c) {
  constexpr bool kDirect = std::is_same_v<C, float>;
  const int64_t m = a.rows(), n = b.cols(), k = a.cols();
  const int64_t block_rows = m >= 1024 ? 128 : 64, block_k = kDirect ? 1024 : k;
  thread_local Staging<float> shared;
  for (int64_t first_k = 0; first_k < k; first_k += block_k) {
    const int64_t count_k = std::min(block_k, k - first_k);
    const Block right = shared_block<T>(b, first_k, count_k, shared);
    parallel_for(m, block_rows, [&](int64_t begin, int64_t end) {
      thread_local Staging<float> left, result;
      for (int64_t row = begin; row < end; row += block_rows) {
        const int64_t rows = std::min(block_rows, end - row);
        const int64_t stride = kDirect ? c.row_stride : n;
        float* out;
        if constexpr (kDirect)
          out = c.as<float>() + row * stride;
        else
          out = result.get(static_cast<size_t>(rows * n));
        if (first_k == 0) start_block<T, C>(c, bias, accumulate, row, rows, out, stride);
        multiply(a.transposed, block_of<T>(a, row, rows, first_k, count_k, left), b.transposed, right, out,
                 stride, rows, n, count_k);
        if constexpr (!kDirect)
          for (int64_t i = 0; i < rows; ++i) store_row(out + i * n, c.as<C>() + (row + i) * c.row_stride, n);
      }
    });
  }
}

// Plain loops; fp64 is for oracles and gradient checks.
void gemm_f64(const Operand& a, const Operand& b, const Tensor& bias, bool accumulate, const Tensor& c) {
  const double *x = a.matrix.as<double>(), *w = b.matrix.as<double>();
  const int64_t x_row = a.transposed ? 1 : a.matrix.row_stride,
                x_col = a.transposed ? a.matrix.row_stride : 1;
  const int64_t w_row = b.transposed ? 1 : b.matrix.row_stride,
                w_col = b.transposed ? b.matrix.row_stride : 1;
  parallel_for(a.rows(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double* out = c.as<double>() + i * c.row_stride;
      for (int64_t j = 0; j < b.cols(); ++j) {
        double sum = (accumulate ? out[j] : 0) + (bias ? bias.as<double>()[j] : 0);
        for (int64_t l = 0; l < a.cols(); ++l) sum += x[i * x_row + l * x_col] * w[l * w_row + j * w_col];
        out[j] = sum;
      }
    }
  });
}

}  // namespace

void gemm(const Operand& a, const Operand& b, const Tensor& bias, bool accumulate, const Tensor& c) {
  if (amx_suits(a, b, c)) return gemm_amx(a, b, bias, accumulate, c);
  visit_dtype(a.matrix.dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (std::is_same_v<T, double>)
      gemm_f64(a, b, bias, accumulate, c);
    else if (c.dtype == a.matrix.dtype)
      blocked_gemm<T, T>(a, b, bias, accumulate, c);
    else
      blocked_gemm<T, float>(a, b, bias, accumulate, c);
  });
}

}  // namespace kernels::cpu

// Small dense tiles in fp32 (fp64 for fp64), compiled once per instruction set: include it between
// foreach_target.h and the code that uses it. Columns of a tile are padded to multiples of 16; what padding
// holds is never used as a value. Every element of a product is summed over k in ascending order with fused
// multiply-adds, whatever the width of the vectors.
#if defined(FORETELL_TILE_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef FORETELL_TILE_INL_H
#undef FORETELL_TILE_INL_H
#else
#define FORETELL_TILE_INL_H
#endif

#include <algorithm>
#include <cmath>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kernels::cpu::HWY_NAMESPACE {

constexpr int64_t kTile = 64;
constexpr int64_t kPad = 16;
constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// out[i][c] = scale * x[i][c]; columns from the head's width to ld are zero.
template <class A>
void load_tile(const HeadView& x, int64_t rows, A scale, A* out, int64_t ld) {
  visit_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (std::is_same_v<acc_t<T>, A>) {
      const hn::ScalableTag<A> d;
      const int64_t lanes = hn::Lanes(d);
      for (int64_t i = 0; i < rows; ++i) {
        const T* from = static_cast<const T*>(x.data) + i * x.row_stride;
        A* to = out + i * ld;
        int64_t c = 0;
        for (; c + lanes <= x.width; c += lanes)
          hn::StoreU(hn::Mul(load(d, from + c, Whole{}), hn::Set(d, scale)), d, to + c);
        for (; c < x.width; ++c) to[c] = static_cast<A>(from[c]) * scale;
        for (; c < ld; ++c) to[c] = 0;
      }
    }
  });
}

// x[i][c] = scale * in[i][c], rounded to x's type.
template <class A>
void store_tile(const A* in, int64_t ld, int64_t rows, A scale, const HeadView& x) {
  visit_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (std::is_same_v<acc_t<T>, A>) {
      const hn::ScalableTag<A> d;
      const int64_t lanes = hn::Lanes(d);
      for (int64_t i = 0; i < rows; ++i) {
        const A* from = in + i * ld;
        T* to = static_cast<T*>(x.data) + i * x.row_stride;
        int64_t c = 0;
        for (; c + lanes <= x.width; c += lanes)
          store(d, hn::Mul(hn::LoadU(d, from + c), hn::Set(d, scale)), to + c, Whole{});
        for (; c < x.width; ++c) to[c] = T(from[c] * scale);
      }
    }
  });
}

// out[c][r] = in[r][c].
template <class A>
void transpose(const A* in, int64_t ld, int64_t rows, int64_t cols, A* out, int64_t ld_out) {
  int64_t r = 0;
  if constexpr (std::is_same_v<A, float>) {
    for (; r + 4 <= rows; r += 4)
      for (int64_t c = 0; c < cols; c += 4) {
        __m128 a = _mm_loadu_ps(in + r * ld + c), b = _mm_loadu_ps(in + (r + 1) * ld + c);
        __m128 e = _mm_loadu_ps(in + (r + 2) * ld + c), f = _mm_loadu_ps(in + (r + 3) * ld + c);
        _MM_TRANSPOSE4_PS(a, b, e, f);
        _mm_storeu_ps(out + c * ld_out + r, a);
        _mm_storeu_ps(out + (c + 1) * ld_out + r, b);
        _mm_storeu_ps(out + (c + 2) * ld_out + r, e);
        _mm_storeu_ps(out + (c + 3) * ld_out + r, f);
      }
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) out[c * ld_out + r] = in[r * ld + c];
}

// A matrix whose element (i, k) is data[i * row + k * col]: a tile or its transpose.
template <class A>
struct Left {
  const A* data;
  int64_t row, col;
};

template <int M, int N, class D, class A>
HWY_INLINE void product_block(D d, bool accumulate, int64_t k, const Left<A>& a, const A* HWY_RESTRICT b,
                              int64_t ldb, A* HWY_RESTRICT c, int64_t ldc) {
  const int64_t lanes = hn::Lanes(d);
  hn::Vec<D> sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[i][j] = accumulate ? hn::LoadU(d, c + i * ldc + j * lanes) : hn::Zero(d);
  for (int64_t p = 0; p < k; ++p) {
    hn::Vec<D> right[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) right[j] = hn::LoadU(d, b + p * ldb + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const auto left = hn::Set(d, a.data[i * a.row + p * a.col]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[i][j] = hn::MulAdd(left, right[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) hn::StoreU(sum[i][j], d, c + i * ldc + j * lanes);
}

template <int N, class D, class A>
HWY_INLINE void product_columns(D d, bool accumulate, int64_t m, int64_t k, Left<A> a, const A* b,
                                int64_t ldb, A* c, int64_t ldc) {
  constexpr int kRows = 4;
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows, a.data += kRows * a.row)
    product_block<kRows, N>(d, accumulate, k, a, b, ldb, c + i * ldc, ldc);
  for (; i < m; ++i, a.data += a.row) product_block<1, N>(d, accumulate, k, a, b, ldb, c + i * ldc, ldc);
}

// c (m, n) = or += a (m, k) b (k, n); n is rounded up to a multiple of 16.
template <class A>
void product(bool accumulate, int64_t m, int64_t n, int64_t k, const Left<A>& a, const A* b, int64_t ldb,
             A* c, int64_t ldc) {
  const hn::ScalableTag<A> d;
  const int64_t lanes = hn::Lanes(d);
  // As many accumulators as the register file holds beside the operands.
  constexpr int kWide = HWY_MAX_BYTES >= 64 ? 4 : 2;
  int64_t j = 0;
  for (; j + kWide * lanes <= padded(n); j += kWide * lanes)
    product_columns<kWide>(d, accumulate, m, k, a, b + j, ldb, c + j, ldc);
  for (; j < n; j += lanes) product_columns<1>(d, accumulate, m, k, a, b + j, ldb, c + j, ldc);
}

// The three products around a causal tile L (rows, cols), row i of which sees columns 0..i when `diagonal`
// and all otherwise. Rows are taken 16 at a time so that most of the upper half is never computed.
template <class A>
void scores(bool diagonal, int64_t rows, int64_t cols, int64_t width, const A* q, int64_t ldq, const A* k_t,
            A* l) {
  if (!diagonal) return product(false, rows, cols, width, Left<A>{q, ldq, 1}, k_t, kTile, l, kTile);
  for (int64_t i = 0; i < rows; i += kPad)
    product(false, std::min(kPad, rows - i), std::min(cols, i + kPad), width, Left<A>{q + i * ldq, ldq, 1},
            k_t, kTile, l + i * kTile, kTile);
}

// out (rows, width) += L x, x (cols, width).
template <class A>
void times(bool diagonal, int64_t rows, int64_t cols, int64_t width, const A* l, const A* x, A* out,
           int64_t ld) {
  if (!diagonal) return product(true, rows, width, cols, Left<A>{l, kTile, 1}, x, ld, out, ld);
  for (int64_t i = 0; i < rows; i += kPad)
    product(true, std::min(kPad, rows - i), width, std::min(cols, i + kPad), Left<A>{l + i * kTile, kTile, 1},
            x, ld, out + i * ld, ld);
}

// out (cols, width) += L^T x, x (rows, width).
template <class A>
void times_transposed(bool diagonal, int64_t rows, int64_t cols, int64_t width, const A* l, const A* x,
                      A* out, int64_t ld) {
  if (!diagonal) return product(true, cols, width, rows, Left<A>{l, 1, kTile}, x, ld, out, ld);
  for (int64_t j = 0; j < cols; j += kPad)
    product(true, std::min(kPad, cols - j), width, rows - j, Left<A>{l + j * kTile + j, 1, kTile}, x + j * ld,
            ld, out + j * ld, ld);
}

// Columns of a causal tile that row i sees.
inline int64_t visible(bool diagonal, int64_t i, int64_t cols) {
  return diagonal ? std::min(cols, i + 1) : cols;
}

// elu(x) + 1: x + 1 above zero and e^x below. In the maximum the second operand is what comes out when either
// is NaN.
template <class D>
HWY_INLINE hn::Vec<D> feature(D d, hn::Vec<D> x) {
  return hn::Add(exponential(d, hn::Min(x, hn::Zero(d))), hn::Max(hn::Zero(d), x));
}

// phi of the first `width` columns of each row, in place.
template <class A>
void feature_tile(A* x, int64_t ld, int64_t rows, int64_t width) {
  const hn::ScalableTag<A> d;
  const int64_t lanes = hn::Lanes(d);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < width; c += lanes) {
      const auto value = feature(d, hn::LoadU(d, x + i * ld + c));
      hn::StoreU(hn::IfThenElseZero(hn::FirstN(d, static_cast<size_t>(width - c)), value), d, x + i * ld + c);
    }
}

template <class A>
A dot(const A* x, const A* y, int64_t width) {
  const hn::ScalableTag<A> d;
  auto sum = hn::Zero(d);
  for (int64_t c = 0; c < padded(width); c += static_cast<int64_t>(hn::Lanes(d)))
    sum = hn::MulAdd(hn::LoadU(d, x + c), hn::LoadU(d, y + c), sum);
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

}  // namespace kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif

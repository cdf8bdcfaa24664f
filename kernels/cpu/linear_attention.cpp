// Training linear attention, chunkwise: per sequence and key head, chunks of 64 rows in order; the state
// carries what lies before a chunk, a causal tile what lies inside it.
#include "kernels/ops/linear_attention.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/linear_attention.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include "kernels/cpu/tile-inl.h"

#ifndef FORETELL_LINEAR_TASK
#define FORETELL_LINEAR_TASK
namespace kernels::cpu {
struct LinearTask : AttentionTask {
  const LinearAttentionParams& params;
};
}  // namespace kernels::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace kernels::cpu::HWY_NAMESPACE {

// Zeroes what row i of a causal tile does not see, among the columns that the tile's products read.
template <class A>
void mask_tile(int64_t rows, A* l) {
  for (int64_t i = 0; i < rows; ++i) std::fill(l + i * kTile + i + 1, l + i * kTile + padded(i + 1), A{0});
}

// total[c] += sum over rows of scale[i] * x[i][c]; scale may be null.
template <class A>
void add_rows(const A* x, int64_t ld, int64_t rows, const A* scale, A* total) {
  for (int64_t i = 0; i < rows; ++i) {
    const A factor = scale ? scale[i] : A{1};
    for (int64_t c = 0; c < ld; ++c) total[c] += factor * x[i * ld + c];
  }
}

template <class A>
void load_features(const Tensor& x, int64_t row, int64_t head, int64_t rows, A* out, int64_t ld) {
  load_tile<A>(head_view(x, row, head), rows, 1, out, ld);
  feature_tile(out, ld, rows, x.dim(2));
}

template <class A>
struct LinearChunk {
  int64_t row, rows;  // of the packed batch
  bool first;
  const A *keys, *keys_t, *values, *s, *z;
};

template <class A>
void linear_forward_chunk(const LinearTask& t, const LinearChunk<A>& c, int64_t head) {
  const int64_t ld = padded(t.width()), m = c.rows;
  A *q = staging<A>(5, kTile * ld), *l = staging<A>(6, kTile * kTile), *out = staging<A>(7, kTile * ld);
  load_features(t.q, c.row, head, m, q, ld);
  if (c.first) {
    std::fill_n(out, m * ld, A{0});
  } else {
    product(false, m, ld, ld, Left<A>{q, ld, 1}, c.s, ld, out, ld);
  }
  scores(true, m, m, ld, q, ld, c.keys_t, l);
  mask_tile(m, l);
  times(true, m, m, ld, l, c.values, out, ld);
  if (t.params.normalise) {
    for (int64_t i = 0; i < m; ++i) {
      A sum = dot(q + i * ld, c.z, ld) + static_cast<A>(t.params.eps);
      for (int64_t j = 0; j <= i; ++j) sum += l[i * kTile + j];
      t.saved_at<A>(c.row + i, head) = sum;
      const A inverse = 1 / sum;
      for (int64_t d = 0; d < ld; ++d) out[i * ld + d] *= inverse;
    }
  }
  store_tile<A>(out, ld, m, 1, head_view(t.o, c.row, head));
}

template <class A>
void linear_forward(const LinearTask& t) {
  const int64_t ld = padded(t.width());
  A *keys = staging<A>(0, kTile * ld), *keys_t = staging<A>(1, kTile * ld),
    *values = staging<A>(2, kTile * ld);
  A *s = staging<A>(3, ld * ld), *z = staging<A>(4, ld);
  std::fill_n(s, ld * ld, A{0});
  std::fill_n(z, ld, A{0});
  for (int64_t at = 0; at < t.rows; at += kTile) {
    const LinearChunk<A> c{t.begin + at, std::min(kTile, t.rows - at), at == 0, keys, keys_t, values, s, z};
    load_features(t.k, c.row, t.key_head, c.rows, keys, ld);
    transpose(keys, ld, c.rows, ld, keys_t, kTile);
    load_tile<A>(head_view(t.v, c.row, t.key_head), c.rows, 1, values, ld);
    for (int64_t head = t.key_head * t.group(); head < (t.key_head + 1) * t.group(); ++head)
      linear_forward_chunk(t, c, head);
    if (at + kTile >= t.rows) break;
    product(true, ld, ld, c.rows, Left<A>{keys, 1, ld}, values, ld, s, ld);
    add_rows<A>(keys, ld, c.rows, nullptr, z);
  }
}

template <class A>
struct LinearBackward {
  A *keys, *keys_t, *values, *values_t;  // this chunk
  A *s_t, *z;                            // transposed state before this chunk
  A *r, *r_t, *r_z;                      // sums over later queries: phi(q) dn^T and phi(q) dd
  A *dk, *dv;
};

// The query side of a chunk. With n = S^T phi(q), dn = do / denominator and dd = -(do . o) / denominator:
// writes dq, adds to the chunk's dk (for phi(k)) and dv, and adds the chunk's queries to r.
template <class A>
void linear_backward_queries(const LinearTask& t, const LinearBackward<A>& b, int64_t row, int64_t m,
                             int64_t head) {
  const int64_t width = t.width(), ld = padded(width);
  A *q = staging<A>(10, kTile * ld), *dn = staging<A>(11, kTile * ld), *dq = staging<A>(12, kTile * ld);
  A *l = staging<A>(13, kTile * kTile), *w = staging<A>(14, kTile * kTile);
  A dd[kTile] = {};
  load_tile<A>(head_view(t.dout, row, head), m, 1, dn, ld);
  if (t.params.normalise) {
    load_tile<A>(head_view(t.o, row, head), m, 1, q, ld);
    for (int64_t i = 0; i < m; ++i) {
      const A inverse = 1 / t.saved_at<A>(row + i, head);
      dd[i] = -dot(dn + i * ld, q + i * ld, ld) * inverse;
      for (int64_t d = 0; d < ld; ++d) dn[i * ld + d] *= inverse;
    }
  }
  load_features(t.q, row, head, m, q, ld);
  scores(true, m, m, ld, dn, ld, b.values_t, w);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j <= i; ++j) w[i * kTile + j] += dd[i];
  mask_tile(m, w);
  scores(true, m, m, ld, q, ld, b.keys_t, l);
  mask_tile(m, l);
  product(false, m, ld, ld, Left<A>{dn, ld, 1}, b.s_t, ld, dq, ld);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t d = 0; d < ld; ++d) dq[i * ld + d] += dd[i] * b.z[d];
  times(true, m, m, ld, w, b.keys, dq, ld);
  times_transposed(true, m, m, ld, w, q, b.dk, ld);
  times_transposed(true, m, m, ld, l, dn, b.dv, ld);
  product(true, ld, ld, m, Left<A>{q, 1, ld}, dn, ld, b.r, ld);
  add_rows<A>(q, ld, m, dd, b.r_z);
  // phi' = 1 above zero, phi below.
  for (int64_t i = 0; i < m * ld; ++i) dq[i] *= std::min(q[i], A{1});
  store_tile<A>(dq, ld, m, 1, head_view(t.dq, row, head));
}

// What later chunks' queries send back to this chunk's keys and values.
template <class A>
void linear_backward_later(const LinearBackward<A>& b, int64_t m, int64_t ld, bool last) {
  if (last) {
    std::fill_n(b.dk, m * ld, A{0});
    std::fill_n(b.dv, m * ld, A{0});
    return;
  }
  transpose(b.r, ld, ld, ld, b.r_t, ld);
  for (int64_t i = 0; i < m; ++i) std::copy_n(b.r_z, ld, b.dk + i * ld);
  product(true, m, ld, ld, Left<A>{b.values, ld, 1}, b.r_t, ld, b.dk, ld);
  product(false, m, ld, ld, Left<A>{b.keys, ld, 1}, b.r, ld, b.dv, ld);
}

template <class A>
void linear_load_keys(const LinearTask& t, const LinearBackward<A>& b, int64_t row, int64_t m, int64_t ld) {
  load_features(t.k, row, t.key_head, m, b.keys, ld);
  load_tile<A>(head_view(t.v, row, t.key_head), m, 1, b.values, ld);
}

// Ascending sweep: the (transposed) state before each chunk. Descending sweep: all gradients.
template <class A>
void linear_backward(const LinearTask& t) {
  const int64_t ld = padded(t.width()), chunks = (t.rows + kTile - 1) / kTile, tile = kTile * ld;
  LinearBackward<A> b{staging<A>(0, tile),
                      staging<A>(1, tile),
                      staging<A>(2, tile),
                      staging<A>(3, tile),
                      nullptr,
                      nullptr,
                      staging<A>(4, ld * ld + ld),
                      staging<A>(5, ld * ld),
                      nullptr,
                      staging<A>(6, tile),
                      staging<A>(7, tile)};
  b.r_z = b.r + ld * ld;
  std::fill_n(b.r, ld * ld + ld, A{0});
  A *states = staging<A>(8, chunks * ld * ld), *sums = staging<A>(9, chunks * ld);
  std::fill_n(states, ld * ld, A{0});
  std::fill_n(sums, ld, A{0});
  for (int64_t i = 0; i + 1 < chunks; ++i) {
    A *s_t = states + (i + 1) * ld * ld, *z = sums + (i + 1) * ld;
    linear_load_keys(t, b, t.begin + i * kTile, kTile, ld);
    std::copy_n(s_t - ld * ld, ld * ld, s_t);
    std::copy_n(z - ld, ld, z);
    product(true, ld, ld, kTile, Left<A>{b.values, 1, ld}, b.keys, ld, s_t, ld);
    add_rows<A>(b.keys, ld, kTile, nullptr, z);
  }
  for (int64_t i = chunks - 1; i >= 0; --i) {
    const int64_t row = t.begin + i * kTile, m = std::min(kTile, t.rows - i * kTile);
    b.s_t = states + i * ld * ld;
    b.z = sums + i * ld;
    linear_load_keys(t, b, row, m, ld);
    transpose(b.keys, ld, m, ld, b.keys_t, kTile);
    transpose(b.values, ld, m, ld, b.values_t, kTile);
    linear_backward_later(b, m, ld, i + 1 == chunks);
    for (int64_t head = t.key_head * t.group(); head < (t.key_head + 1) * t.group(); ++head)
      linear_backward_queries(t, b, row, m, head);
    for (int64_t e = 0; e < m * ld; ++e) b.dk[e] *= std::min(b.keys[e], A{1});
    store_tile<A>(b.dk, ld, m, 1, head_view(t.dk, row, t.key_head));
    store_tile<A>(b.dv, ld, m, 1, head_view(t.dv, row, t.key_head));
  }
}

void LinearForward(const LinearTask& t) {
  t.q.dtype == DType::f64 ? linear_forward<double>(t) : linear_forward<float>(t);
}
void LinearBackwardPass(const LinearTask& t) {
  t.q.dtype == DType::f64 ? linear_backward<double>(t) : linear_backward<float>(t);
}

}  // namespace kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kernels::cpu {

HWY_EXPORT(LinearForward);
HWY_EXPORT(LinearBackwardPass);

void linear_attention(const Context&, const LinearAttentionParams& params, const Tensor& q, const Tensor& k,
                      const Tensor& v, const Tensor& cu_seqlens, Tensor o, Tensor denominator) {
  check_sequences("linear_attention", cu_seqlens, q.rows());
  clear_outside(cu_seqlens, o);
  if (params.normalise) clear_outside(cu_seqlens, denominator);
  const Tensor none;
  for_each_sequence_head(cu_seqlens, k.dim(1), [&](int64_t begin, int64_t rows, int64_t head) {
    HWY_DYNAMIC_DISPATCH(LinearForward)
    ({{q, k, v, o, denominator, none, none, none, none, begin, rows, head}, params});
  });
}

void linear_attention_backward(const Context&, const LinearAttentionParams& params, const Tensor& dout,
                               const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                               const Tensor& denominator, const Tensor& cu_seqlens, Tensor dq, Tensor dk,
                               Tensor dv) {
  check_sequences("linear_attention_backward", cu_seqlens, q.rows());
  for (const Tensor& gradient : {dq, dk, dv}) clear_outside(cu_seqlens, gradient);
  for_each_sequence_head(cu_seqlens, k.dim(1), [&](int64_t begin, int64_t rows, int64_t head) {
    HWY_DYNAMIC_DISPATCH(LinearBackwardPass)
    ({{q, k, v, o, denominator, dout, dq, dk, dv, begin, rows, head}, params});
  });
}

}  // namespace kernels::cpu
#endif

// Training attention, tiled: per sequence and key head, tiles of 64 queries meet tiles of 64 keys, and only
// the running maximum and sum of each row are kept.
#include "kernels/ops/softmax_attention.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/softmax_attention.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include "kernels/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kernels::cpu::HWY_NAMESPACE {

// Takes a tile of scores into the running maximum and sum of each row: l becomes exp(score - maximum), the
// rows of out are rescaled to the new maximum.
template <class A>
void softmax_tile(bool diagonal, int64_t rows, int64_t cols, A* l, A* maximum, A* sum, A* out, int64_t ld) {
  const hn::ScalableTag<A> d;
  const int64_t lanes = hn::Lanes(d);
  const A lowest = -std::numeric_limits<A>::infinity();
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t n = visible(diagonal, i, cols);
    A* row = l + i * kTile;
    auto peak = hn::Set(d, maximum[i]);
    for (int64_t c = 0; c < n; c += lanes) {
      const auto seen = hn::FirstN(d, static_cast<size_t>(n - c));
      peak = hn::Max(peak, hn::IfThenElse(seen, hn::LoadU(d, row + c), hn::Set(d, lowest)));
    }
    const auto top = hn::MaxOfLanes(d, peak);
    auto total = hn::Zero(d);
    for (int64_t c = 0; c < padded(n); c += lanes) {
      const auto seen = hn::FirstN(d, static_cast<size_t>(std::max<int64_t>(n - c, 0)));
      const auto p = hn::IfThenElseZero(seen, exponential(d, hn::Sub(hn::LoadU(d, row + c), top)));
      total = hn::Add(total, p);
      hn::StoreU(p, d, row + c);
    }
    const A m = hn::GetLane(top), shrink = std::exp(maximum[i] - m);
    sum[i] = sum[i] * shrink + hn::GetLane(hn::SumOfLanes(d, total));
    if (maximum[i] != m)
      for (int64_t c = 0; c < ld; ++c) out[i * ld + c] *= shrink;
    maximum[i] = m;
  }
}

// p = exp(l - log_sum), 0 where the row does not see; then dp = p (dp - delta).
template <class A>
void probabilities_tile(bool diagonal, int64_t rows, int64_t cols, A* l, const A* log_sum) {
  const hn::ScalableTag<A> d;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t n = visible(diagonal, i, cols);
    for (int64_t c = 0; c < padded(n); c += static_cast<int64_t>(hn::Lanes(d))) {
      A* at = l + i * kTile + c;
      const auto seen = hn::FirstN(d, static_cast<size_t>(std::max<int64_t>(n - c, 0)));
      hn::StoreU(hn::IfThenElseZero(seen, exponential(d, hn::Sub(hn::LoadU(d, at), hn::Set(d, log_sum[i])))),
                 d, at);
    }
  }
}

template <class A>
void score_gradient_tile(bool diagonal, int64_t rows, int64_t cols, const A* p, const A* delta, A* dp) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t n = visible(diagonal, i, cols);
    const A* from = p + i * kTile;
    A* to = dp + i * kTile;
    for (int64_t c = 0; c < n; ++c) to[c] = from[c] * (to[c] - delta[i]);
    for (int64_t c = n; c < padded(n); ++c) to[c] = 0;
  }
}

template <class A>
void softmax_forward(const AttentionTask& t) {
  const int64_t width = t.width(), ld = padded(width), tiles = (t.rows + kTile - 1) / kTile,
                step = kTile * ld;
  A *keys = staging<A>(0, tiles * step), *values = staging<A>(1, tiles * step), *q = staging<A>(2, step);
  A *l = staging<A>(3, kTile * kTile), *out = staging<A>(4, step);
  A maximum[kTile], sum[kTile];
  for (int64_t j = 0; j < tiles; ++j) {
    const int64_t n = std::min(kTile, t.rows - j * kTile), row = t.begin + j * kTile;
    load_tile<A>(head_view(t.k, row, t.key_head), n, 1, q, ld);
    transpose(q, ld, n, ld, keys + j * step, kTile);
    load_tile<A>(head_view(t.v, row, t.key_head), n, 1, values + j * step, ld);
  }
  for (int64_t head = t.key_head * t.group(); head < (t.key_head + 1) * t.group(); ++head)
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t m = std::min(kTile, t.rows - i * kTile), row = t.begin + i * kTile;
      load_tile<A>(head_view(t.q, row, head), m, 1 / std::sqrt(static_cast<A>(width)), q, ld);
      std::fill_n(out, m * ld, A{0});
      std::fill_n(maximum, m, -std::numeric_limits<A>::infinity());
      std::fill_n(sum, m, A{0});
      for (int64_t j = 0; j <= i; ++j) {
        const int64_t n = std::min(kTile, t.rows - j * kTile);
        scores(i == j, m, n, ld, q, ld, keys + j * step, l);
        softmax_tile(i == j, m, n, l, maximum, sum, out, ld);
        times(i == j, m, n, ld, l, values + j * step, out, ld);
      }
      for (int64_t r = 0; r < m; ++r) {
        for (int64_t c = 0; c < ld; ++c) out[r * ld + c] /= sum[r];
        t.saved_at<A>(row + r, head) = maximum[r] + std::log(sum[r]);
      }
      store_tile<A>(out, ld, m, 1, head_view(t.o, row, head));
    }
}

template <class A>
struct SoftmaxTiles {
  A *keys, *keys_t, *values_t, *dk, *dv;  // one tile after another
};

// One tile of queries against the tiles of keys before it: adds to dk and dv, writes dq.
template <class A>
void softmax_backward_tile(const AttentionTask& t, const SoftmaxTiles<A>& tiles, int64_t i, int64_t head) {
  const int64_t width = t.width(), ld = padded(width), step = kTile * ld;
  const int64_t m = std::min(kTile, t.rows - i * kTile), row = t.begin + i * kTile;
  A *q = staging<A>(5, step), *dout = staging<A>(6, step), *dq = staging<A>(7, step);
  A *p = staging<A>(8, kTile * kTile), *dp = staging<A>(9, kTile * kTile);
  A delta[kTile], log_sum[kTile];
  const A scale = 1 / std::sqrt(static_cast<A>(width));
  load_tile<A>(head_view(t.dout, row, head), m, 1, dout, ld);
  load_tile<A>(head_view(t.o, row, head), m, 1, q, ld);
  for (int64_t r = 0; r < m; ++r) {
    delta[r] = dot(dout + r * ld, q + r * ld, width);
    log_sum[r] = t.saved_at<A>(row + r, head);
  }
  load_tile<A>(head_view(t.q, row, head), m, scale, q, ld);
  std::fill_n(dq, m * ld, A{0});
  for (int64_t j = 0; j <= i; ++j) {
    const int64_t n = std::min(kTile, t.rows - j * kTile);
    const bool diagonal = i == j;
    scores(diagonal, m, n, ld, q, ld, tiles.keys_t + j * step, p);
    probabilities_tile(diagonal, m, n, p, log_sum);
    times_transposed(diagonal, m, n, ld, p, dout, tiles.dv + j * step, ld);
    scores(diagonal, m, n, ld, dout, ld, tiles.values_t + j * step, dp);
    score_gradient_tile(diagonal, m, n, p, delta, dp);
    times_transposed(diagonal, m, n, ld, dp, q, tiles.dk + j * step, ld);
    times(diagonal, m, n, ld, dp, tiles.keys + j * step, dq, ld);
  }
  store_tile<A>(dq, ld, m, scale, head_view(t.dq, row, head));
}

template <class A>
void softmax_backward(const AttentionTask& t) {
  const int64_t ld = padded(t.width()), count = (t.rows + kTile - 1) / kTile, step = kTile * ld;
  SoftmaxTiles<A> tiles{staging<A>(0, count * step), staging<A>(1, count * step), staging<A>(2, count * step),
                        staging<A>(3, count * step), staging<A>(4, count * step)};
  std::fill_n(tiles.dk, count * step, A{0});
  std::fill_n(tiles.dv, count * step, A{0});
  A* value = staging<A>(5, step);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t n = std::min(kTile, t.rows - j * kTile), row = t.begin + j * kTile;
    load_tile<A>(head_view(t.k, row, t.key_head), n, 1, tiles.keys + j * step, ld);
    transpose(tiles.keys + j * step, ld, n, ld, tiles.keys_t + j * step, kTile);
    load_tile<A>(head_view(t.v, row, t.key_head), n, 1, value, ld);
    transpose(value, ld, n, ld, tiles.values_t + j * step, kTile);
  }
  for (int64_t head = t.key_head * t.group(); head < (t.key_head + 1) * t.group(); ++head)
    for (int64_t i = 0; i < count; ++i) softmax_backward_tile(t, tiles, i, head);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t n = std::min(kTile, t.rows - j * kTile), row = t.begin + j * kTile;
    store_tile<A>(tiles.dk + j * step, ld, n, 1, head_view(t.dk, row, t.key_head));
    store_tile<A>(tiles.dv + j * step, ld, n, 1, head_view(t.dv, row, t.key_head));
  }
}

void SoftmaxForward(const AttentionTask& t) {
  t.q.dtype == DType::f64 ? softmax_forward<double>(t) : softmax_forward<float>(t);
}
void SoftmaxBackward(const AttentionTask& t) {
  t.q.dtype == DType::f64 ? softmax_backward<double>(t) : softmax_backward<float>(t);
}

}  // namespace kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kernels::cpu {

HWY_EXPORT(SoftmaxForward);
HWY_EXPORT(SoftmaxBackward);

void softmax_attention(const Context&, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& cu_seqlens, Tensor o, Tensor log_sum) {
  check_sequences("softmax_attention", cu_seqlens, q.rows());
  clear_outside(cu_seqlens, o);
  clear_outside(cu_seqlens, log_sum);
  const Tensor none;
  for_each_sequence_head(cu_seqlens, k.dim(1), [&](int64_t begin, int64_t rows, int64_t head) {
    HWY_DYNAMIC_DISPATCH(SoftmaxForward)({q, k, v, o, log_sum, none, none, none, none, begin, rows, head});
  });
}

void softmax_attention_backward(const Context&, const Tensor& dout, const Tensor& q, const Tensor& k,
                                const Tensor& v, const Tensor& o, const Tensor& log_sum,
                                const Tensor& cu_seqlens, Tensor dq, Tensor dk, Tensor dv) {
  check_sequences("softmax_attention_backward", cu_seqlens, q.rows());
  for (const Tensor& gradient : {dq, dk, dv}) clear_outside(cu_seqlens, gradient);
  for_each_sequence_head(cu_seqlens, k.dim(1), [&](int64_t begin, int64_t rows, int64_t head) {
    HWY_DYNAMIC_DISPATCH(SoftmaxBackward)({q, k, v, o, log_sum, dout, dq, dk, dv, begin, rows, head});
  });
}

}  // namespace kernels::cpu
#endif

// Decoding with a cache: scores over a row's slots, their softmax, the weighted sum of values.
#include "kernels/ops/softmax_attention.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/softmax_attention_decode.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include "kernels/cpu/decode-inl.h"

#ifndef FORETELL_SOFTMAX_DECODE_TASK
#define FORETELL_SOFTMAX_DECODE_TASK
namespace kernels::cpu {
struct SoftmaxDecodeTask : DecodeTask {
  const Tensor &cache_k, &cache_v;
};
}  // namespace kernels::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace kernels::cpu::HWY_NAMESPACE {

// x[t] = exp(x[t] - max); returns the sum.
template <class A>
A softmax_list(A* x, int64_t count) {
  const hn::ScalableTag<A> d;
  const int64_t lanes = hn::Lanes(d);
  std::fill(x + count, x + padded(count), -std::numeric_limits<A>::infinity());
  auto peak = hn::LoadU(d, x);
  for (int64_t t = lanes; t < padded(count); t += lanes) peak = hn::Max(peak, hn::LoadU(d, x + t));
  peak = hn::MaxOfLanes(d, peak);
  for (int64_t t = 0; t < padded(count); t += lanes)
    hn::StoreU(exponential(d, hn::Sub(hn::LoadU(d, x + t), peak)), d, x + t);
  return sum_list(x, count);
}

// R queries from `first` on.
template <int R, class T, class D>
void softmax_decode_queries(D d, const SoftmaxDecodeTask& t, int64_t first) {
  using A = acc_t<T>;
  const DecodeSequence& s = t.sequence;
  const int64_t width = t.q.dim(2), stride = t.k.dim(1) * width;
  const int64_t ldl = padded(s.length + kMaxDecodeRows) + kPad, ld = padded(width);
  const Slots<T> keys{cache_head<T>(t.cache_k, s.index, t.key_head), stride};
  const Slots<T> values{cache_head<T>(t.cache_v, s.index, t.key_head), stride};
  A *q = staging<A>(0, kQueries * ld), *out = staging<A>(1, kQueries * ld),
    *l = staging<A>(2, kQueries * ldl);
  int32_t own[R][kMaxDecodeRows];
  int64_t owned[R];
  A total[R];
  for (int r = 0; r < R; ++r) {
    load_tile<A>(t.of_query(t.q, first + r), 1, 1 / std::sqrt(static_cast<A>(width)), q + r * ld, ld);
    owned[r] = ancestor_slots(t.ancestors(first + r), s.first_slot, own[r]);
  }
  dot_slots<R>(d, width, q, ld, keys, nullptr, s.length, l, ldl);
  for (int r = 0; r < R; ++r) {
    dot_slots<1>(d, width, q + r * ld, ld, keys, own[r], owned[r], l + r * ldl + s.length, ldl);
    total[r] = softmax_list(l + r * ldl, s.length + owned[r]);
  }
  std::fill_n(out, R * ld, A{0});
  add_slots<R>(d, width, l, ldl, values, nullptr, s.length, out, ld);
  for (int r = 0; r < R; ++r) {
    add_slots<1>(d, width, l + r * ldl + s.length, ldl, values, own[r], owned[r], out + r * ld, ld);
    store_tile<A>(out + r * ld, ld, 1, 1 / total[r], t.of_query(t.o, first + r));
  }
}

void SoftmaxDecode(const SoftmaxDecodeTask& t) {
  visit_dtype(t.q.dtype, [&](auto tag) {
    using T = decltype(tag);
    with_lanes<acc_t<T>>(t.q.dim(2), [&](auto d) {
      for_query_blocks<kQueriesOf<decltype(d)>>(
          t, [&](auto r, int64_t first) { softmax_decode_queries<r(), T>(d, t, first); });
    });
  });
}

}  // namespace kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kernels::cpu {

HWY_EXPORT(SoftmaxDecode);

void softmax_attention_decode(const Context&, const Tensor& q, const Tensor& k, const Tensor& v,
                              const DecodeRows& rows, Tensor cache_k, Tensor cache_v, Tensor o) {
  const int64_t sequences = cache_k.rows(), heads = q.dim(1), key_heads = k.dim(1);
  int64_t work = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    const DecodeSequence s = decode_sequence(rows, b, false);
    check_decode_sequence("softmax_attention_decode", s, cache_k.dim(1), q.rows());
    work += s.rows * (s.length + s.rows) * q.cols() * 2;
  }
  for_each_decode_head(sequences, key_heads, k.rows() * k.cols() * 2, [&](int64_t b, int64_t head) {
    const DecodeSequence s = decode_sequence(rows, b, false);
    append_rows(k, s, head, cache_k);
    append_rows(v, s, head, cache_v);
  });
  for_each_decode_query(
      rows, heads, key_heads, work, [&](int64_t b, int64_t head, int64_t first, int64_t queries) {
        HWY_DYNAMIC_DISPATCH(SoftmaxDecode)
        ({{q, k, o, decode_sequence(rows, b, false), head, first, queries}, cache_k, cache_v});
      });
}

}  // namespace kernels::cpu
#endif

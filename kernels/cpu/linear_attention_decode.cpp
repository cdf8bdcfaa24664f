// Decoding with a folded state: what lies before the fold comes from S and z, what lies after it from raw
// rows. Every element of S is summed in the order of the tokens.
#include "kernels/ops/linear_attention.h"
#include "kernels/ops/softmax_attention.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/linear_attention_decode.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include "kernels/cpu/decode-inl.h"

#ifndef FORETELL_LINEAR_DECODE_TASK
#define FORETELL_LINEAR_DECODE_TASK
namespace kernels::cpu {
struct LinearDecodeTask : DecodeTask {
  const LinearAttentionParams& params;
  const LinearAttentionState& state;
};
}  // namespace kernels::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace kernels::cpu::HWY_NAMESPACE {

template <class A>
A* state_head(const Tensor& x, int64_t sequence, int64_t head) {
  return x.as<A>() + sequence * x.row_stride + head * (x.cols() / x.dim(1));
}

template <int R, class T, class D>
void linear_decode_queries(D d, const LinearDecodeTask& t, int64_t first) {
  using A = acc_t<T>;
  constexpr int64_t kList = 2 * kFold + kPad;
  const DecodeSequence& s = t.sequence;
  const int64_t width = t.q.dim(2), ld = padded(width);
  const int64_t committed = s.first_slot;
  const Slots<A> keys{cache_head<A>(t.state.recent_k, s.index, t.key_head), t.k.dim(1) * width};
  const Slots<T> values{cache_head<T>(t.state.recent_v, s.index, t.key_head), t.k.dim(1) * width};
  const Slots<A> folded{state_head<A>(t.state.s, s.index, t.key_head), width};
  const Slots<A> folded_sum{state_head<A>(t.state.z, s.index, t.key_head), width};
  A *q = staging<A>(1, kQueries * ld), *out = staging<A>(2, kQueries * ld);
  alignas(64) A l[R * kList], z[R * 4];
  int32_t own[R][kMaxDecodeRows];
  int64_t owned[R];
  for (int r = 0; r < R; ++r) {
    load_tile<A>(t.of_query(t.q, first + r), 1, 1, q + r * ld, ld);
    owned[r] = ancestor_slots(t.ancestors(first + r), s.first_slot, own[r]);
  }
  feature_tile(q, ld, R, width);
  std::fill_n(out, R * ld, A{0});
  add_slots<R>(d, width, q, ld, folded, nullptr, width, out, ld);
  dot_slots<R>(d, width, q, ld, folded_sum, nullptr, 1, z, 4);
  dot_slots<R>(d, width, q, ld, keys, nullptr, committed, l, kList);
  add_slots<R>(d, width, l, kList, values, nullptr, committed, out, ld);
  for (int r = 0; r < R; ++r) {
    A* mine = l + r * kList;
    dot_slots<1>(d, width, q + r * ld, ld, keys, own[r], owned[r], mine + committed, kList);
    add_slots<1>(d, width, mine + committed, kList, values, own[r], owned[r], out + r * ld, ld);
    const A sum = sum_list(mine, committed + owned[r]) + z[r * 4] + static_cast<A>(t.params.eps);
    store_tile<A>(out + r * ld, ld, 1, t.params.normalise ? 1 / sum : A{1}, t.of_query(t.o, first + r));
  }
}

// The step's rows of one head into their slots, keys as phi(k).
void LinearAppend(const Tensor& k, const Tensor& v, const DecodeSequence& s, int64_t head,
                  const LinearAttentionState& state) {
  visit_dtype(state.recent_k.dtype, [&](auto tag) {
    using A = acc_t<decltype(tag)>;
    const int64_t width = k.dim(2), ld = padded(width);
    A* features = staging<A>(0, kMaxDecodeRows * ld);
    load_tile<A>(head_view(k, s.first_row, head), s.rows, 1, features, ld);
    feature_tile(features, ld, s.rows, width);
    store_tile<A>(features, ld, s.rows, 1, slot_view(state.recent_k, s.index, head, s.first_slot));
  });
  append_rows(v, s, head, state.recent_v);
}

void LinearDecode(const LinearDecodeTask& t) {
  visit_dtype(t.q.dtype, [&](auto tag) {
    using T = decltype(tag);
    with_lanes<acc_t<T>>(t.q.dim(2), [&](auto d) {
      for_query_blocks<kQueriesOf<decltype(d)>>(
          t, [&](auto r, int64_t first) { linear_decode_queries<r(), T>(d, t, first); });
    });
  });
}

// S += phi(k_j) v_j^T and z += phi(k_j) for the kFold rows in order.
void LinearFold(const LinearAttentionState& state, int64_t sequence, int64_t head) {
  visit_dtype(state.recent_v.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const int64_t width = state.recent_k.dim(3), ld = padded(width), stride = state.recent_k.dim(2) * width;
    A *values = staging<A>(0, kFold * ld), *sum = staging<A>(1, width * ld);
    const A* features = cache_head<A>(state.recent_k, sequence, head);
    load_tile<A>(slot_view(state.recent_v, sequence, head, 0), kFold, 1, values, ld);
    const HeadView s{state_head<A>(state.s, sequence, head), state.s.dtype, width, width};
    load_tile<A>(s, width, 1, sum, ld);
    product(true, width, ld, kFold, Left<A>{features, 1, stride}, values, ld, sum, ld);
    store_tile<A>(sum, ld, width, 1, s);
    A* z = state_head<A>(state.z, sequence, head);
    for (int64_t j = 0; j < kFold; ++j)
      for (int64_t c = 0; c < width; ++c) z[c] += features[j * stride + c];
  });
}

}  // namespace kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kernels::cpu {

HWY_EXPORT(LinearAppend);
HWY_EXPORT(LinearDecode);
HWY_EXPORT(LinearFold);

void linear_attention_decode(const Context&, const LinearAttentionParams& params, const Tensor& q,
                             const Tensor& k, const Tensor& v, const DecodeRows& rows,
                             LinearAttentionState& state, Tensor o) {
  const int64_t sequences = state.s.rows(), heads = q.dim(1), key_heads = k.dim(1);
  int64_t work = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    const DecodeSequence s = decode_sequence(rows, b, true);
    check_decode_sequence("linear_attention_decode", s, 2 * kFold, q.rows());
    work += s.rows * (2 * s.first_slot + s.rows + q.dim(2)) * q.cols();
  }
  constexpr int64_t kFeature = 8;  // multiply-adds of one feature
  for_each_decode_head(sequences, key_heads, k.rows() * k.cols() * kFeature, [&](int64_t b, int64_t head) {
    HWY_DYNAMIC_DISPATCH(LinearAppend)(k, v, decode_sequence(rows, b, true), head, state);
  });
  for_each_decode_query(rows, heads, key_heads, work,
                        [&](int64_t b, int64_t head, int64_t first, int64_t queries) {
                          HWY_DYNAMIC_DISPATCH(LinearDecode)
                          ({{q, k, o, decode_sequence(rows, b, true), head, first, queries}, params, state});
                        });
}

void linear_attention_commit(const Context& ctx, const CommitPath& path, LinearAttentionState& state) {
  cpu::commit_rows(ctx, path, true, state.recent_k);
  cpu::commit_rows(ctx, path, true, state.recent_v);
  const int32_t *lengths = path.lengths.as<int32_t>(), *counts = path.counts.as<int32_t>();
  const int64_t sequences = path.counts.rows(), heads = state.s.dim(1), width = state.s.dim(2);
  const auto folds = [&](int64_t b) { return counts[b] > 0 && (lengths[b] + counts[b]) % kFold == 0; };
  int64_t work = 0;
  for (int64_t b = 0; b < sequences; ++b)
    if (folds(b)) work += heads * kFold * width * width;
  for_each_decode_head(sequences, heads, work, [&](int64_t b, int64_t head) {
    if (folds(b)) HWY_DYNAMIC_DISPATCH(LinearFold)(state, b, head);
  });
}

}  // namespace kernels::cpu
#endif

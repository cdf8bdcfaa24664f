#pragma once
// Causal softmax attention over packed sequences, grouped key/value heads.
//   o_i = sum_{j <= i, same sequence} p_ij v_j,   p_i = softmax_j(q_i . k_j / sqrt(D))
// q, o (N, H, D); k, v (N, Hk, D), H a multiple of Hk: query head h reads key head h / (H / Hk).
// cu_seqlens (S + 1) int32: sequence s owns rows [cu_seqlens[s], cu_seqlens[s + 1]).
// Rows that belong to no sequence get o = 0 and gradients 0.
// Saved: log_sum (N, H) main type, the log of the softmax denominator, so that the backward rebuilds p. With
// AttentionHints::uniform a GPU may keep its values in an order of its own, the same in both directions.
// Backward: dq, dk, dv written. Scores, softmax and sums are fp32. Source: Vaswani et al. 2017; Dao et al.
// 2022 (tiling).
//
// Decoding: the step's k, v rows are written to the cache at slots lengths[b] + j; each row then reads every
// committed slot and, of the step's own, its ancestors. The order of sums is given by the number of slots
// alone, so a row's result does not depend on the other rows of the step. cache_k, cache_v (B, capacity, Hk,
// D). commit moves the accepted rows' slots to lengths[b], lengths[b] + 1, ...
#include "kernels/core/context.h"
#include "kernels/ops/decode_rows.h"

namespace kernels {

// What the host knows about cu_seqlens, which lies on the device. The same hints go to both directions.
struct AttentionHints {
  int64_t longest = 0;        // no sequence has more rows; 0: unknown
  bool uniform = false;       // every sequence has exactly `longest` rows and together they are all N
  bool deterministic = true;  // the backward gives the same bits every time, at some cost on a GPU
};

void softmax_attention(const Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& cu_seqlens, Tensor o, Tensor log_sum, const AttentionHints& hints = {});
void softmax_attention_backward(const Context& ctx, const Tensor& dout, const Tensor& q, const Tensor& k,
                                const Tensor& v, const Tensor& o, const Tensor& log_sum,
                                const Tensor& cu_seqlens, Tensor dq, Tensor dk, Tensor dv,
                                const AttentionHints& hints = {});
void softmax_attention_decode(const Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                              const DecodeRows& rows, Tensor cache_k, Tensor cache_v, Tensor o);
// Also used by every state that keeps rows: cache (B, capacity, ...). since_fold: slots are counted from the
// last multiple of kFold (linear_attention.h), not from 0.
void commit_rows(const Context& ctx, const CommitPath& path, bool since_fold, Tensor cache);

namespace cpu {
void softmax_attention(const Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& cu_seqlens, Tensor o, Tensor log_sum);
void softmax_attention_backward(const Context& ctx, const Tensor& dout, const Tensor& q, const Tensor& k,
                                const Tensor& v, const Tensor& o, const Tensor& log_sum,
                                const Tensor& cu_seqlens, Tensor dq, Tensor dk, Tensor dv);
void softmax_attention_decode(const Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                              const DecodeRows& rows, Tensor cache_k, Tensor cache_v, Tensor o);
void commit_rows(const Context& ctx, const CommitPath& path, bool since_fold, Tensor cache);
}  // namespace cpu

namespace cuda {
// fp16 and bf16 with head sizes that are multiples of 8: cuDNN; the rest, head sizes up to 256: own kernels.
void softmax_attention(const Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& cu_seqlens, Tensor o, Tensor log_sum, const AttentionHints& hints);
void softmax_attention_backward(const Context& ctx, const Tensor& dout, const Tensor& q, const Tensor& k,
                                const Tensor& v, const Tensor& o, const Tensor& log_sum,
                                const Tensor& cu_seqlens, Tensor dq, Tensor dk, Tensor dv,
                                const AttentionHints& hints);
// On a GPU nobody checks lengths, rows and paths, which lie on the device: rows beyond the capacity are not
// stored, and paths that ascend no further than kMaxDecodeRows are the caller's promise.
void softmax_attention_decode(const Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                              const DecodeRows& rows, Tensor cache_k, Tensor cache_v, Tensor o);
void commit_rows(const Context& ctx, const CommitPath& path, bool since_fold, Tensor cache);
}  // namespace cuda

}  // namespace kernels

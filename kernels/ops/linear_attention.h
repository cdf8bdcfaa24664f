#pragma once
// Causal linear attention with the feature map phi(x) = elu(x) + 1 (Katharopoulos et al. 2020), chunkwise.
//   S_i = sum_{j <= i} phi(k_j) v_j^T,   z_i = sum_{j <= i} phi(k_j)
//   normalised:   o_i = S_i^T phi(q_i) / (z_i . phi(q_i) + eps)
//   otherwise:    o_i = S_i^T phi(q_i)        un-normalised sums outgrow fp16: o is of the main type (fp32)
//   here
// q, o (N, H, D); k, v (N, Hk, D), query head h reads key head h / (H / Hk); packed sequences by cu_seqlens
// (S + 1) int32; the state starts at zero in each. eps 1e-6, added in fp32. No scale on q or k. Saved:
// denominator (N, H) main type: z_i . phi(q_i) + eps (normalised only; may be empty otherwise). Backward: dq,
// dk, dv written; the denominator's gradient is part of them. S, z, dS, dz and all sums are fp32 (fp64 for
// fp64). Work is linear in the sequence length: per token and head 4D(C + D) operations forward, 10D(C + D)
// backward. Rows that belong to no sequence get o = 0 and gradients 0. dout may be of the main type.
//
// Decoding state per sequence b: S and z folded over the first F tokens, F = lengths[b] / kFold * kFold, and
// phi(k) and the raw v of the rows since. A row at position p reads S, z and, in slot order, the rows it may
// see; it never reads a row of another branch (that term is exactly 0), so its result is the same bit for bit
// in a chain, a tree or alone.
//   state_s (B, Hk, D, D), state_z (B, Hk, D), recent_k (B, 2 kFold, Hk, D) of the main type (recent_k holds
//   phi(k), made once), recent_v (B, 2 kFold, Hk, D) of the compute type
// The step's rows go to slots lengths[b] - F + j. Rolling back is doing nothing; commit gathers the accepted
// rows and, when the length reaches F + kFold, folds those kFold rows into S and z. All positions of a step
// lie before F + kFold.
#include "kernels/core/context.h"
#include "kernels/ops/decode_rows.h"

namespace kernels {

struct LinearAttentionParams {
  bool normalise = true;
  float eps = 1e-6f;
};

struct LinearAttentionState {
  Tensor s;         // (B, Hk, D, D)
  Tensor z;         // (B, Hk, D)
  Tensor recent_k;  // (B, 2 kFold, Hk, D) phi(k)
  Tensor recent_v;  // (B, 2 kFold, Hk, D)
};

void linear_attention(const Context& ctx, const LinearAttentionParams& params, const Tensor& q,
                      const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, Tensor o,
                      Tensor denominator);
void linear_attention_backward(const Context& ctx, const LinearAttentionParams& params, const Tensor& dout,
                               const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                               const Tensor& denominator, const Tensor& cu_seqlens, Tensor dq, Tensor dk,
                               Tensor dv);
void linear_attention_decode(const Context& ctx, const LinearAttentionParams& params, const Tensor& q,
                             const Tensor& k, const Tensor& v, const DecodeRows& rows,
                             LinearAttentionState& state, Tensor o);
void linear_attention_commit(const Context& ctx, const CommitPath& path, LinearAttentionState& state);

namespace cpu {
void linear_attention(const Context& ctx, const LinearAttentionParams& params, const Tensor& q,
                      const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, Tensor o,
                      Tensor denominator);
void linear_attention_backward(const Context& ctx, const LinearAttentionParams& params, const Tensor& dout,
                               const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                               const Tensor& denominator, const Tensor& cu_seqlens, Tensor dq, Tensor dk,
                               Tensor dv);
void linear_attention_decode(const Context& ctx, const LinearAttentionParams& params, const Tensor& q,
                             const Tensor& k, const Tensor& v, const DecodeRows& rows,
                             LinearAttentionState& state, Tensor o);
void linear_attention_commit(const Context& ctx, const CommitPath& path, LinearAttentionState& state);
}  // namespace cpu

namespace cuda {
void linear_attention(const Context& ctx, const LinearAttentionParams& params, const Tensor& q,
                      const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, Tensor o,
                      Tensor denominator);
void linear_attention_backward(const Context& ctx, const LinearAttentionParams& params, const Tensor& dout,
                               const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                               const Tensor& denominator, const Tensor& cu_seqlens, Tensor dq, Tensor dk,
                               Tensor dv);
void linear_attention_decode(const Context& ctx, const LinearAttentionParams& params, const Tensor& q,
                             const Tensor& k, const Tensor& v, const DecodeRows& rows,
                             LinearAttentionState& state, Tensor o);
void linear_attention_commit(const Context& ctx, const CommitPath& path, LinearAttentionState& state);
}  // namespace cuda

}  // namespace kernels

#include "kernels/ops/linear_attention.h"

namespace kernels {

namespace {

// The un-normalised sum outgrows fp16 and stays in the main type.
DType output_dtype(const LinearAttentionParams& params, const Tensor& q) {
  return params.normalise ? q.dtype : main_dtype(q.dtype);
}

void check_saved(const char* operation, const LinearAttentionParams& params, const Tensor& q,
                 const Tensor& cu_seqlens, const Tensor& o, const Tensor& denominator) {
  check_shape(operation, "o", o, q.shape);
  check_dtype(operation, "o", o, output_dtype(params, q));
  check_dtype(operation, "cu_seqlens", cu_seqlens, DType::i32);
  if (!params.normalise) return;
  check_shape(operation, "denominator", denominator, {q.dim(0), q.dim(1)});
  check_dtype(operation, "denominator", denominator, main_dtype(q.dtype));
}

void check_state(const char* operation, const LinearAttentionState& state) {
  const Tensor& v = state.recent_v;
  const DType main = main_dtype(v.dtype);
  check_shape(operation, "recent_v", v, {v.dim(0), 2 * kFold, v.dim(2), v.dim(3)});
  check_shape(operation, "recent_k", state.recent_k, v.shape);
  check_shape(operation, "state_s", state.s, {v.dim(0), v.dim(2), v.dim(3), v.dim(3)});
  check_shape(operation, "state_z", state.z, {v.dim(0), v.dim(2), v.dim(3)});
  check_dtype(operation, "recent_k", state.recent_k, main);
  check_dtype(operation, "state_s", state.s, main);
  check_dtype(operation, "state_z", state.z, main);
}

}  // namespace

void linear_attention(const Context& ctx, const LinearAttentionParams& params, const Tensor& q,
                      const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, Tensor o,
                      Tensor denominator) {
  check_attention("linear_attention", q, k, v);
  check_saved("linear_attention", params, q, cu_seqlens, o, denominator);
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::linear_attention(ctx, params, q, k, v, cu_seqlens, o, denominator);
  if (ctx.rehearsal) return;
  cpu::linear_attention(ctx, params, q, k, v, cu_seqlens, o, denominator);
}

void linear_attention_backward(const Context& ctx, const LinearAttentionParams& params, const Tensor& dout,
                               const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                               const Tensor& denominator, const Tensor& cu_seqlens, Tensor dq, Tensor dk,
                               Tensor dv) {
  constexpr const char* kName = "linear_attention_backward";
  check_attention(kName, q, k, v);
  if (params.normalise) check_saved(kName, params, q, cu_seqlens, o, denominator);
  check_shape(kName, "dout", dout, q.shape);
  if (dout.dtype != main_dtype(q.dtype)) check_dtype(kName, "dout", dout, q.dtype);
  check_shape(kName, "dq", dq, q.shape);
  check_attention(kName, dq, dk, dv);
  check_shape(kName, "dk", dk, k.shape);
  check_dtype(kName, "dq", dq, q.dtype);
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda())
      return cuda::linear_attention_backward(ctx, params, dout, q, k, v, o, denominator, cu_seqlens, dq, dk,
                                             dv);
  if (ctx.rehearsal) return;
  cpu::linear_attention_backward(ctx, params, dout, q, k, v, o, denominator, cu_seqlens, dq, dk, dv);
}

void linear_attention_decode(const Context& ctx, const LinearAttentionParams& params, const Tensor& q,
                             const Tensor& k, const Tensor& v, const DecodeRows& rows,
                             LinearAttentionState& state, Tensor o) {
  constexpr const char* kName = "linear_attention_decode";
  check_attention(kName, q, k, v);
  check_state(kName, state);
  check_shape(kName, "recent_v", state.recent_v, {state.recent_v.dim(0), 2 * kFold, k.dim(1), k.dim(2)});
  check_dtype(kName, "recent_v", state.recent_v, q.dtype);
  check_shape(kName, "o", o, q.shape);
  check_dtype(kName, "o", o, output_dtype(params, q));
  check_decode_rows(kName, rows, q.rows(), state.s.rows());
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::linear_attention_decode(ctx, params, q, k, v, rows, state, o);
  if (ctx.rehearsal) return;
  cpu::linear_attention_decode(ctx, params, q, k, v, rows, state, o);
}

void linear_attention_commit(const Context& ctx, const CommitPath& path, LinearAttentionState& state) {
  check_commit_path("linear_attention_commit", path, state.s.rows());
  check_state("linear_attention_commit", state);
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::linear_attention_commit(ctx, path, state);
  if (ctx.rehearsal) return;
  cpu::linear_attention_commit(ctx, path, state);
}

}  // namespace kernels

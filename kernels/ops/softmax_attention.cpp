#include "kernels/ops/softmax_attention.h"

#include <fmt/format.h>

namespace kernels {

namespace {

void check_saved(const char* operation, const Tensor& q, const Tensor& cu_seqlens, const Tensor& o,
                 const Tensor& log_sum) {
  check_shape(operation, "o", o, q.shape);
  check_dtype(operation, "o", o, q.dtype);
  check_shape(operation, "log_sum", log_sum, {q.dim(0), q.dim(1)});
  check_dtype(operation, "log_sum", log_sum, main_dtype(q.dtype));
  check_dtype(operation, "cu_seqlens", cu_seqlens, DType::i32);
}

void check_hints(const char* operation, const Tensor& q, const Tensor& cu_seqlens,
                 const AttentionHints& hints) {
  const int64_t sequences = cu_seqlens.rows() - 1;
  if (hints.uniform && sequences * hints.longest != q.rows())
    throw ShapeError(fmt::format("{}: {} sequences of {} rows each were promised, and there are {} rows",
                                 operation, sequences, hints.longest, q.rows()));
}

}  // namespace

void softmax_attention(const Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& cu_seqlens, Tensor o, Tensor log_sum, const AttentionHints& hints) {
  check_attention("softmax_attention", q, k, v);
  check_saved("softmax_attention", q, cu_seqlens, o, log_sum);
  check_hints("softmax_attention", q, cu_seqlens, hints);
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::softmax_attention(ctx, q, k, v, cu_seqlens, o, log_sum, hints);
  if (ctx.rehearsal) return;
  cpu::softmax_attention(ctx, q, k, v, cu_seqlens, o, log_sum);
}

void softmax_attention_backward(const Context& ctx, const Tensor& dout, const Tensor& q, const Tensor& k,
                                const Tensor& v, const Tensor& o, const Tensor& log_sum,
                                const Tensor& cu_seqlens, Tensor dq, Tensor dk, Tensor dv,
                                const AttentionHints& hints) {
  constexpr const char* kName = "softmax_attention_backward";
  check_attention(kName, q, k, v);
  check_saved(kName, q, cu_seqlens, o, log_sum);
  check_shape(kName, "dout", dout, q.shape);
  check_dtype(kName, "dout", dout, q.dtype);
  check_shape(kName, "dq", dq, q.shape);
  check_attention(kName, dq, dk, dv);
  check_shape(kName, "dk", dk, k.shape);
  check_dtype(kName, "dq", dq, q.dtype);
  check_hints(kName, q, cu_seqlens, hints);
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda())
      return cuda::softmax_attention_backward(ctx, dout, q, k, v, o, log_sum, cu_seqlens, dq, dk, dv, hints);
  if (ctx.rehearsal) return;
  cpu::softmax_attention_backward(ctx, dout, q, k, v, o, log_sum, cu_seqlens, dq, dk, dv);
}

void softmax_attention_decode(const Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                              const DecodeRows& rows, Tensor cache_k, Tensor cache_v, Tensor o) {
  constexpr const char* kName = "softmax_attention_decode";
  check_attention(kName, q, k, v);
  check_shape(kName, "cache_k", cache_k, {cache_k.dim(0), cache_k.dim(1), k.dim(1), k.dim(2)});
  check_shape(kName, "cache_v", cache_v, cache_k.shape);
  check_dtype(kName, "cache_k", cache_k, q.dtype);
  check_dtype(kName, "cache_v", cache_v, q.dtype);
  check_shape(kName, "o", o, q.shape);
  check_dtype(kName, "o", o, q.dtype);
  check_decode_rows(kName, rows, q.rows(), cache_k.rows());
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::softmax_attention_decode(ctx, q, k, v, rows, cache_k, cache_v, o);
  if (ctx.rehearsal) return;
  cpu::softmax_attention_decode(ctx, q, k, v, rows, cache_k, cache_v, o);
}

void commit_rows(const Context& ctx, const CommitPath& path, bool since_fold, Tensor cache) {
  check_commit_path("commit_rows", path, cache.rows());
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::commit_rows(ctx, path, since_fold, cache);
  cpu::commit_rows(ctx, path, since_fold, cache);
}

}  // namespace kernels

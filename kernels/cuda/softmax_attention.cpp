#include "kernels/cuda/softmax_attention.h"

#include <fmt/format.h>

namespace kernels::cuda {

namespace {

void run(const Context& ctx, const char* operation, const AttentionCall& call) {
  if (!ctx.scratch)
    throw DeviceError(fmt::format("{}: a GPU needs working memory; give the context an arena", operation));
  if (cudnn_attention(ctx, call)) return;
  if (call.width() > kLargestWidth)
    throw ShapeError(fmt::format("{}: q is {}; on a GPU heads of at most {} elements are supported",
                                 operation, to_string(call.q), kLargestWidth));
  tiled_attention(ctx, call);
}

}  // namespace

void softmax_attention(const Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& cu_seqlens, Tensor o, Tensor log_sum, const AttentionHints& hints) {
  run(ctx, "softmax_attention",
      {.q = q, .k = k, .v = v, .o = o, .log_sum = log_sum, .cu_seqlens = cu_seqlens, .hints = hints});
}

void softmax_attention_backward(const Context& ctx, const Tensor& dout, const Tensor& q, const Tensor& k,
                                const Tensor& v, const Tensor& o, const Tensor& log_sum,
                                const Tensor& cu_seqlens, Tensor dq, Tensor dk, Tensor dv,
                                const AttentionHints& hints) {
  run(ctx, "softmax_attention_backward",
      {.q = q,
       .k = k,
       .v = v,
       .o = o,
       .log_sum = log_sum,
       .cu_seqlens = cu_seqlens,
       .dout = dout,
       .dq = dq,
       .dk = dk,
       .dv = dv,
       .hints = hints});
}

}  // namespace kernels::cuda

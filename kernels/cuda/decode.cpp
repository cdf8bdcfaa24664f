#include "kernels/cuda/decode.h"

namespace kernels::cuda {

void softmax_attention_decode(const Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                              const DecodeRows& rows, Tensor cache_k, Tensor cache_v, Tensor o) {
  if (q.rows() == 0) return;
  const DecodeCall call{q, k, v, rows, cache_k, cache_v, o};
  if (!softmax_decode_tiles(ctx, call)) softmax_decode_any(ctx, call);
}

}  // namespace kernels::cuda

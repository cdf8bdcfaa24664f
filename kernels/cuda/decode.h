#pragma once
// The parts of decoding with a cache on a GPU: kernels on tensor cores, and plain ones for every type and
// head size.
#include "kernels/ops/softmax_attention.h"

namespace kernels::cuda {

struct DecodeCall {
  Tensor q, k, v;
  DecodeRows rows;
  Tensor cache_k, cache_v, o;
};

// Runs the step, or rehearses its working memory. False where head size, type or alignment do not fit.
bool softmax_decode_tiles(const Context& ctx, const DecodeCall& call);
void softmax_decode_any(const Context& ctx, const DecodeCall& call);

}  // namespace kernels::cuda

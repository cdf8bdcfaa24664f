#pragma once
// From logits to tokens.
//   argmax          tokens[i] = the smallest index of the largest logit of row i
//   probabilities   p_i = softmax(logits_i / temperature), temperature > 0, fp32; sums run in a fixed order
//   top_k           the k largest logits of each row, descending, ties by the smaller index: indices (N, k)
//   int32
// logits (N, V) fp32 or compute type. Every row is computed alone: results do not depend on N.
#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace kernels {

void argmax(const Context& ctx, const Tensor& logits, Tensor tokens);
void probabilities(const Context& ctx, const Tensor& logits, float temperature, Tensor p);
void top_k(const Context& ctx, const Tensor& logits, Tensor indices);

namespace cpu {
void argmax(const Context& ctx, const Tensor& logits, Tensor tokens);
void probabilities(const Context& ctx, const Tensor& logits, float temperature, Tensor p);
void top_k(const Context& ctx, const Tensor& logits, Tensor indices);
}  // namespace cpu

namespace cuda {
void argmax(const Context& ctx, const Tensor& logits, Tensor tokens);
void probabilities(const Context& ctx, const Tensor& logits, float temperature, Tensor p);
void top_k(const Context& ctx, const Tensor& logits, Tensor indices);
}  // namespace cuda

}  // namespace kernels

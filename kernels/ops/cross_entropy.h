#pragma once
// Cross entropy with the gradient written over the logits.
//   loss_i = -log softmax(logits_i)[target_i]
//   loss_sum += sum_i weight_i loss_i          (1) fp64, accumulated in order of i
//   logits_i <- seed * weight_i (softmax(logits_i) - onehot(target_i))     untouched where seed is empty
// logits (N, V), V columns used of a possibly larger stride; targets (N) int32; weights (N) fp32. A row with
// weight 0 or a negative target contributes nothing and gets a zero gradient. Maximum, sum and logarithm are
// fp32 (fp64 for fp64). `seed` (1) fp32 carries the loss scale, so that a small gradient is not lost in fp16;
// it lives on the device, where the scale does.
// A target beyond the vocabulary is an error; on a GPU its loss and gradients are NaN. On a GPU the losses of
// the rows pass through ctx.scratch and are added up in a fixed order.
#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace kernels {

void cross_entropy(const Context& ctx, Tensor logits, const Tensor& targets, const Tensor& weights,
                   const Tensor& seed, Tensor loss_sum);

namespace cpu {
void cross_entropy(const Context& ctx, Tensor logits, const Tensor& targets, const Tensor& weights,
                   const Tensor& seed, Tensor loss_sum);
}  // namespace cpu

namespace cuda {
void cross_entropy(const Context& ctx, Tensor logits, const Tensor& targets, const Tensor& weights,
                   const Tensor& seed, Tensor loss_sum);
}  // namespace cuda

}  // namespace kernels

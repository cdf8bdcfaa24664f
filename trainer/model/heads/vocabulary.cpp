#include "trainer/model/heads/vocabulary.h"

#include <algorithm>

#include "kernels/ops/cross_entropy.h"

namespace trainer {

void vocabulary_loss(const Context& ctx, const Linear& unembedding, const Tensor& hidden,
                     const Tensor& targets, const Tensor& weights, const Tensor& seed, Tensor loss_sum,
                     Tensor dhidden) {
  const kernels::ArenaScope scope(*ctx.scratch);
  const int64_t chunk = std::min(kLogitRows, hidden.rows());
  const Tensor buffer = ctx.scratch->allocate("logits", hidden.dtype, {chunk, unembedding.outputs()});
  for (int64_t begin = 0; begin < hidden.rows(); begin += chunk) {
    const int64_t count = std::min(chunk, hidden.rows() - begin);
    const Tensor x = hidden.slice(begin, count);
    const Tensor logits = buffer.slice(0, count);
    unembedding.forward(ctx, x, logits);
    kernels::cross_entropy(ctx, logits, targets.slice(begin, count), weights.slice(begin, count), seed,
                           loss_sum);
    if (!seed) continue;
    unembedding.backward_weight(ctx, logits, x);
    if (dhidden) unembedding.backward_input(ctx, logits, dhidden.slice(begin, count), true);
  }
}

}  // namespace trainer

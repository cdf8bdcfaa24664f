#include "trainer/model/heads/vocabulary.h"

#include <algorithm>

#include "kernels/ops/cross_entropy.h"

namespace trainer {

int64_t logit_rows(const kernels::Device& device, int64_t rows, int64_t vocabulary, kernels::DType dtype) {
  constexpr int64_t kCpuRows = 512, kGpuBytes = int64_t{2} << 30, kMultiple = 128;
  if (!device.is_cuda()) return std::min(kCpuRows, rows);
  const int64_t bytes = rows * vocabulary * static_cast<int64_t>(kernels::size_of(dtype));
  const int64_t parts = (bytes + kGpuBytes - 1) / kGpuBytes;
  return std::min(rows, (rows / parts + kMultiple - 1) / kMultiple * kMultiple);
}

void vocabulary_loss(const Context& ctx, const Linear& unembedding, const Tensor& hidden,
                     const Tensor& targets, const Tensor& weights, const Tensor& seed, Tensor loss_sum,
                     Tensor dhidden) {
  const kernels::ArenaScope scope(*ctx.scratch);
  const int64_t chunk = logit_rows(ctx.device, hidden.rows(), unembedding.outputs(), hidden.dtype);
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

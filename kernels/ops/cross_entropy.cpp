#include "kernels/ops/cross_entropy.h"

#include <fmt/format.h>

namespace kernels {

void cross_entropy(const Context& ctx, Tensor logits, const Tensor& targets, const Tensor& weights,
                   const Tensor& seed, Tensor loss_sum) {
  constexpr auto kName = "cross_entropy";
  if (logits.shape.rank() != 2 || logits.cols() < 1)
    throw ShapeError(fmt::format("{}: logits are {}, expected (N, V)", kName, to_string(logits)));
  check_shape(kName, "targets", targets, Shape{logits.rows()});
  check_dtype(kName, "targets", targets, DType::i32);
  check_shape(kName, "weights", weights, Shape{logits.rows()});
  check_dtype(kName, "weights", weights, DType::f32);
  if (seed) {
    check_shape(kName, "seed", seed, Shape{1});
    check_dtype(kName, "seed", seed, DType::f32);
  }
  check_shape(kName, "loss_sum", loss_sum, Shape{1});
  check_dtype(kName, "loss_sum", loss_sum, DType::f64);
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::cross_entropy(ctx, logits, targets, weights, seed, loss_sum);
  if (ctx.rehearsal) return;
  return cpu::cross_entropy(ctx, logits, targets, weights, seed, loss_sum);
}

}  // namespace kernels

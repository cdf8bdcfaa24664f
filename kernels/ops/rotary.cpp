#include "kernels/ops/rotary.h"

#include <fmt/format.h>

namespace kernels {

void rotary(const Context& ctx, Tensor x, const Tensor& positions, float theta, int direction) {
  if (x.shape.rank() != 3 || x.dim(2) % 2 != 0)
    throw ShapeError(fmt::format("rotary: x is {}, expected (N, H, D) with an even D", to_string(x)));
  check_shape("rotary", "positions", positions, Shape{x.rows()});
  check_dtype("rotary", "positions", positions, DType::i32);
  if (!(theta > 0)) throw ShapeError(fmt::format("rotary: theta is {}, expected a positive number", theta));
  if (direction != 1 && direction != -1)
    throw ShapeError(fmt::format("rotary: direction is {}, expected 1 or -1", direction));
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::rotary(ctx, x, positions, theta, direction);
  return cpu::rotary(ctx, x, positions, theta, direction);
}

}  // namespace kernels

#include "kernels/ops/cast.h"

namespace kernels {

void cast(const Context& ctx, const Tensor& x, Tensor y) {
  check_shape("cast", "y", y, x.shape);
  if (ctx.rehearsal) return;
  return cpu::cast(ctx, x, y);
}

void fill(const Context& ctx, Tensor y, float value) {
  if (ctx.rehearsal) return;
  return cpu::fill(ctx, y, value);
}

}  // namespace kernels

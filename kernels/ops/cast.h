#pragma once
// Conversion and filling.
//   cast   y = x, rounded to y's type (any pair of floating-point types, same shape)
//   fill   y = value
#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace kernels {

void cast(const Context& ctx, const Tensor& x, Tensor y);
void fill(const Context& ctx, Tensor y, float value);

namespace cpu {
void cast(const Context& ctx, const Tensor& x, Tensor y);
void fill(const Context& ctx, Tensor y, float value);
}  // namespace cpu

namespace cuda {
void cast(const Context& ctx, const Tensor& x, Tensor y);
void fill(const Context& ctx, Tensor y, float value);
}  // namespace cuda

}  // namespace kernels

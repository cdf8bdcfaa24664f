#pragma once
// Rotary position embedding, half-split layout (as Hugging Face Llama), in place on x (N, H, D), D even:
//   (x1, x2) = (x[d], x[d + D/2]);  angle = position * theta^(-2d/D)
//   x1' = x1 cos - x2 sin;  x2' = x1 sin + x2 cos
// The backward is the rotation by the negative angle: direction = -1. positions (N) int32. Angles are
// computed in fp64, the rotation in fp32. On a GPU D is at most 512. Source: Su et al. 2021.
#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace kernels {

void rotary(const Context& ctx, Tensor x, const Tensor& positions, float theta, int direction = 1);

namespace cpu {
void rotary(const Context& ctx, Tensor x, const Tensor& positions, float theta, int direction);
}  // namespace cpu

namespace cuda {
void rotary(const Context& ctx, Tensor x, const Tensor& positions, float theta, int direction);
}  // namespace cuda

}  // namespace kernels

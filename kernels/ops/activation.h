#pragma once
// Element-wise operations.
//   swiglu      y (N, F) = silu(a) * b          x (N, 2F) = [a; b]; silu(a) = a / (1 + exp(-a))
//   gelu        y = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))     the tanh form, as GPT-2
//   silu_add    y = x + silu(u)                 the Medusa residual block
//   add         y = a + b                       y may be a or b
// Backward writes dx (=) from the saved inputs. silu_add_backward writes du; dx = dy is the caller's sum.
// Computed in fp32, rounded once. Rows may be strided.
#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace kernels {

void swiglu(const Context& ctx, const Tensor& x, Tensor y);
void swiglu_backward(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dx);
void gelu(const Context& ctx, const Tensor& x, Tensor y);
void gelu_backward(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dx);
void silu_add(const Context& ctx, const Tensor& x, const Tensor& u, Tensor y);
void silu_add_backward(const Context& ctx, const Tensor& dy, const Tensor& u, Tensor du);
void add(const Context& ctx, const Tensor& a, const Tensor& b, Tensor y);

namespace cpu {
void swiglu(const Context& ctx, const Tensor& x, Tensor y);
void swiglu_backward(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dx);
void gelu(const Context& ctx, const Tensor& x, Tensor y);
void gelu_backward(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dx);
void silu_add(const Context& ctx, const Tensor& x, const Tensor& u, Tensor y);
void silu_add_backward(const Context& ctx, const Tensor& dy, const Tensor& u, Tensor du);
void add(const Context& ctx, const Tensor& a, const Tensor& b, Tensor y);
}  // namespace cpu

namespace cuda {
void swiglu(const Context& ctx, const Tensor& x, Tensor y);
void swiglu_backward(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dx);
void gelu(const Context& ctx, const Tensor& x, Tensor y);
void gelu_backward(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dx);
void silu_add(const Context& ctx, const Tensor& x, const Tensor& u, Tensor y);
void silu_add_backward(const Context& ctx, const Tensor& dy, const Tensor& u, Tensor du);
void add(const Context& ctx, const Tensor& a, const Tensor& b, Tensor y);
}  // namespace cuda

}  // namespace kernels

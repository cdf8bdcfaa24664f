#include "kernels/ops/activation.h"

namespace kernels {

namespace {
void check_same(const char* operation, const char* argument, const Tensor& given, const Tensor& like) {
  check_shape(operation, argument, given, like.shape);
  check_dtype(operation, argument, given, like.dtype);
}
void check_pair(const char* operation, const char* argument, const Tensor& given, const Tensor& half) {
  check_shape(operation, argument, given, Shape{half.rows(), 2 * half.cols()});
  check_dtype(operation, argument, given, half.dtype);
}
}  // namespace

void swiglu(const Context& ctx, const Tensor& x, Tensor y) {
  check_pair("swiglu", "x", x, y);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::swiglu(ctx, x, y);
  return cpu::swiglu(ctx, x, y);
}

void swiglu_backward(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dx) {
  check_pair("swiglu_backward", "x", x, dy);
  check_pair("swiglu_backward", "dx", dx, dy);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::swiglu_backward(ctx, dy, x, dx);
  return cpu::swiglu_backward(ctx, dy, x, dx);
}

void gelu(const Context& ctx, const Tensor& x, Tensor y) {
  check_same("gelu", "y", y, x);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::gelu(ctx, x, y);
  return cpu::gelu(ctx, x, y);
}

void gelu_backward(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dx) {
  check_same("gelu_backward", "x", x, dy);
  check_same("gelu_backward", "dx", dx, dy);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::gelu_backward(ctx, dy, x, dx);
  return cpu::gelu_backward(ctx, dy, x, dx);
}

void silu_add(const Context& ctx, const Tensor& x, const Tensor& u, Tensor y) {
  check_same("silu_add", "u", u, x);
  check_same("silu_add", "y", y, x);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::silu_add(ctx, x, u, y);
  return cpu::silu_add(ctx, x, u, y);
}

void silu_add_backward(const Context& ctx, const Tensor& dy, const Tensor& u, Tensor du) {
  check_same("silu_add_backward", "u", u, dy);
  check_same("silu_add_backward", "du", du, dy);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::silu_add_backward(ctx, dy, u, du);
  return cpu::silu_add_backward(ctx, dy, u, du);
}

void add(const Context& ctx, const Tensor& a, const Tensor& b, Tensor y) {
  check_same("add", "b", b, a);
  check_same("add", "y", y, a);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::add(ctx, a, b, y);
  return cpu::add(ctx, a, b, y);
}

}  // namespace kernels

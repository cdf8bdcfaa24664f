#include "kernels/ops/sampling.h"

#include <fmt/format.h>

#include <algorithm>

namespace kernels {

namespace {
void check_logits(const char* operation, const Tensor& logits) {
  if (logits.shape.rank() != 2 || logits.cols() < 1)
    throw ShapeError(fmt::format("{}: logits are {}, expected (N, V)", operation, to_string(logits)));
}
}  // namespace

void argmax(const Context& ctx, const Tensor& logits, Tensor tokens) {
  check_logits("argmax", logits);
  check_shape("argmax", "tokens", tokens, Shape{logits.rows()});
  check_dtype("argmax", "tokens", tokens, DType::i32);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::argmax(ctx, logits, tokens);
  return cpu::argmax(ctx, logits, tokens);
}

void probabilities(const Context& ctx, const Tensor& logits, float temperature, Tensor p) {
  check_logits("probabilities", logits);
  check_shape("probabilities", "p", p, logits.shape);
  check_dtype("probabilities", "p", p, main_dtype(logits.dtype));
  if (!(temperature > 0))
    throw ShapeError(
        fmt::format("probabilities: temperature is {}, expected a positive number", temperature));
  if (ctx.rehearsal) return;
  temperature = std::max(temperature, 1e-30f);  // of which there is a reciprocal
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::probabilities(ctx, logits, temperature, p);
  return cpu::probabilities(ctx, logits, temperature, p);
}

void top_k(const Context& ctx, const Tensor& logits, Tensor indices) {
  check_logits("top_k", logits);
  check_shape("top_k", "indices", indices, Shape{logits.rows(), indices.cols()});
  check_dtype("top_k", "indices", indices, DType::i32);
  if (indices.cols() > logits.cols())
    throw ShapeError(fmt::format("top_k: {} of {} logits are asked for", indices.cols(), logits.cols()));
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::top_k(ctx, logits, indices);
  return cpu::top_k(ctx, logits, indices);
}

}  // namespace kernels

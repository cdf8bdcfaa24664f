#include "kernels/ops/optimizer.h"

#include <fmt/format.h>

#include <algorithm>

#include "kernels/cpu/optimizer_rules.h"

namespace kernels {

namespace {

void check_state(const char* operation, const Tensor& state) {
  check_dtype(operation, "state", state, DType::u8);
  check_shape(operation, "state", state, Shape{static_cast<int64_t>(sizeof(OptimizerState))});
}

void check_segments(const char* operation, std::span<const Segment> segments, int64_t count) {
  int64_t end = 0;
  for (const Segment& s : segments) {
    if (s.begin < 0 || s.count < 0 || s.begin + s.count > count)
      throw ShapeError(fmt::format("{}: a segment covers elements {} to {}, the buffers hold {}", operation,
                                   s.begin, s.begin + s.count, count));
    if (s.begin < end)
      throw ShapeError(fmt::format("{}: a segment begins at element {}, before the end {} of the last one",
                                   operation, s.begin, end));
    end = s.begin + s.count;
  }
}

void check_factors(const char* operation, const char* argument, const Tensor& given, int64_t count) {
  check_shape(operation, argument, given, Shape{count});
  check_dtype(operation, argument, given, DType::f32);
}

void check_shard(const char* operation, const OptimizerBuffers& buffers) {
  check_dtype(operation, "sums", buffers.sums, DType::f64);
  check_shape(operation, "sums", buffers.sums, Shape{kOptimizerPieces});
  if (buffers.begin < 0 || buffers.total < 1 || buffers.begin % optimizer_piece(buffers.total) != 0)
    throw ShapeError(fmt::format("{}: a shard at element {} of {} does not begin with a piece of {}",
                                 operation, buffers.begin, buffers.total, optimizer_piece(buffers.total)));
}

}  // namespace

int64_t optimizer_piece(int64_t total) {
  constexpr int64_t kAlignment = 32;
  const int64_t share = (total + kOptimizerPieces - 1) / kOptimizerPieces;
  return std::max<int64_t>(1, (share + kAlignment - 1) / kAlignment) * kAlignment;
}

float learning_rate(const Schedule& schedule, int64_t updates) {
  return cpu::scheduled_rate(schedule, updates);
}

void loss_seeds(const Context& ctx, const Tensor& state, const Tensor& factors, Tensor seeds) {
  check_state("loss_seeds", state);
  check_factors("loss_seeds", "factors", factors, factors.numel());
  check_factors("loss_seeds", "seeds", seeds, factors.numel());
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::loss_seeds(ctx, state, factors, seeds);
  return cpu::loss_seeds(ctx, state, factors, seeds);
}

void gradient_statistics(const Context& ctx, std::span<const Segment> segments, const Tensor& normaliser,
                         OptimizerBuffers& buffers) {
  check_state("gradient_statistics", buffers.state);
  check_segments("gradient_statistics", segments, buffers.gradients.numel());
  check_factors("gradient_statistics", "normaliser", normaliser, 1);
  if (buffers.sums) check_shard("gradient_statistics", buffers);
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::gradient_statistics(ctx, segments, normaliser, buffers);
  if (ctx.rehearsal) return;
  return cpu::gradient_statistics(ctx, segments, normaliser, buffers);
}

void gradient_norm(const Context& ctx, const Tensor& normaliser, OptimizerBuffers& buffers) {
  check_state("gradient_norm", buffers.state);
  check_factors("gradient_norm", "normaliser", normaliser, 1);
  check_shard("gradient_norm", buffers);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::gradient_norm(ctx, normaliser, buffers);
  return cpu::gradient_norm(ctx, normaliser, buffers);
}

void update_loss_scale(const Context& ctx, const LossScaleRules& rules, OptimizerBuffers& buffers) {
  check_state("update_loss_scale", buffers.state);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::update_loss_scale(ctx, rules, buffers);
  return cpu::update_loss_scale(ctx, rules, buffers);
}

void adamw(const Context& ctx, std::span<const Segment> segments, const Tensor& normaliser,
           const AdamWParams& params, OptimizerBuffers& buffers) {
  const Shape shape = buffers.weights.shape;
  const DType main = main_dtype(buffers.weights.dtype);
  check_shape("adamw", "weights", buffers.weights, Shape{shape.numel()});
  const std::pair<const char*, const Tensor*> given[] = {
      {"master", &buffers.master}, {"gradients", &buffers.gradients}, {"m", &buffers.m}, {"v", &buffers.v}};
  for (const auto& [name, tensor] : given) {
    check_shape("adamw", name, *tensor, shape);
    check_dtype("adamw", name, *tensor, main);
  }
  check_state("adamw", buffers.state);
  check_segments("adamw", segments, shape.numel());
  check_factors("adamw", "normaliser", normaliser, 1);
  if (buffers.sums) check_shard("adamw", buffers);
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::adamw(ctx, segments, normaliser, params, buffers);
  if (ctx.rehearsal) return;
  return cpu::adamw(ctx, segments, normaliser, params, buffers);
}

}  // namespace kernels

#include "kernels/ops/optimizer.h"

#include <fmt/format.h>

#include <algorithm>

#include "kernels/cpu/optimizer_rules.h"

namespace kernels {

namespace {

constexpr int64_t kAlignment = 32;  // elements of a piece

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

void check_shard(const char* operation, const OptimizerBuffers& buffers, int64_t own) {
  const Shard& shard = buffers.shard;
  if (!buffers.sums) {
    if (shard.ranks != 1 || shard.rank != 0)
      throw ShapeError(fmt::format("{}: a shard needs sums", operation));
    return;
  }
  check_dtype(operation, "sums", buffers.sums, DType::f64);
  check_shape(operation, "sums", buffers.sums, Shape{kOptimizerPieces});
  if (shard.rank < 0 || shard.rank >= shard.ranks || shard.piece <= 0 || shard.piece % kAlignment != 0 ||
      own % shard.piece != 0)
    throw ShapeError(fmt::format("{}: {} elements are not the pieces of {} of rank {} of {}", operation, own,
                                 shard.piece, shard.rank, shard.ranks));
}

void check_whole(const char* operation, const char* argument, const Tensor& given, int64_t own,
                 const OptimizerBuffers& buffers, DType dtype) {
  check_shape(operation, argument, given, Shape{own * buffers.shard.ranks});
  check_dtype(operation, argument, given, dtype);
}

}  // namespace

int64_t optimizer_piece(int64_t total) {
  // Large pieces consist of what a GPU's block reads at once.
  constexpr int64_t kChunk = 8192, kLarge = 16 * kChunk;
  const int64_t share = std::max<int64_t>(1, (total + kOptimizerPieces - 1) / kOptimizerPieces);
  const int64_t grain = share < kLarge ? kAlignment : kChunk;
  return (share + grain - 1) / grain * grain;
}

int64_t Shard::place(int64_t own) const {
  return ranks == 1 ? own : own + own / piece * (stripe() - piece) + rank * piece;
}

int64_t Shard::before(int64_t place) const {
  if (ranks == 1) return place;
  return place / stripe() * piece + std::clamp<int64_t>(place % stripe() - rank * piece, 0, piece);
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
  const int64_t own = buffers.gradients.numel() / std::max(1, buffers.shard.ranks);
  check_shard("gradient_statistics", buffers, own);
  check_shape("gradient_statistics", "gradients", buffers.gradients, Shape{own * buffers.shard.ranks});
  check_segments("gradient_statistics", segments, own);
  check_factors("gradient_statistics", "normaliser", normaliser, 1);
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::gradient_statistics(ctx, segments, normaliser, buffers);
  if (ctx.rehearsal) return;
  return cpu::gradient_statistics(ctx, segments, normaliser, buffers);
}

void gradient_norm(const Context& ctx, const Tensor& normaliser, OptimizerBuffers& buffers) {
  check_state("gradient_norm", buffers.state);
  check_factors("gradient_norm", "normaliser", normaliser, 1);
  check_dtype("gradient_norm", "sums", buffers.sums, DType::f64);
  check_shape("gradient_norm", "sums", buffers.sums, Shape{kOptimizerPieces});
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
           const AdamWParams& params, OptimizerBuffers& buffers, const UpdateParts& parts) {
  const int64_t own = buffers.master.numel();
  const DType main = main_dtype(buffers.weights.dtype);
  check_shard("adamw", buffers, own);
  check_whole("adamw", "weights", buffers.weights, own, buffers, buffers.weights.dtype);
  check_whole("adamw", "gradients", buffers.gradients, own, buffers, main);
  const std::pair<const char*, const Tensor*> given[] = {
      {"master", &buffers.master}, {"m", &buffers.m}, {"v", &buffers.v}};
  for (const auto& [name, tensor] : given) {
    check_shape("adamw", name, *tensor, Shape{own});
    check_dtype("adamw", name, *tensor, main);
  }
  check_state("adamw", buffers.state);
  check_segments("adamw", segments, own);
  check_factors("adamw", "normaliser", normaliser, 1);
  const int64_t piece = buffers.sums ? buffers.shard.piece : optimizer_piece(own);
  if (parts.elements < 0 || parts.elements % piece != 0)
    throw ShapeError(fmt::format("adamw: parts of {} elements cut pieces of {}", parts.elements, piece));
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::adamw(ctx, segments, normaliser, params, buffers, parts);
  if (ctx.rehearsal) return;
  return cpu::adamw(ctx, segments, normaliser, params, buffers, parts);
}

}  // namespace kernels

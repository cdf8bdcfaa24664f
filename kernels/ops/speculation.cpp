#include "kernels/ops/speculation.h"

#include <fmt/format.h>

#include "kernels/core/arena.h"
#include "kernels/ops/linear.h"

namespace kernels {

namespace {

void check_rows(const char* operation, const Tensor& p) {
  if (p.shape.rank() != 2 || p.cols() < 1)
    throw ShapeError(fmt::format("{}: distributions are {}, expected (N, V)", operation, to_string(p)));
  check_dtype(operation, "p", p, DType::f32);
}

// N rows of at most kMaxDecodeRows; returns how many sequences they belong to.
int64_t check_drafts(const char* operation, const DraftRows& rows, const Tensor& p, const Tensor& accepted) {
  check_rows(operation, p);
  const int64_t sequences = accepted.rows(), count = p.rows();
  if (count > kMaxDecodeRows)
    throw ShapeError(fmt::format("{}: {} rows, at most {} fit", operation, count, kMaxDecodeRows));
  check_shape(operation, "accepted", accepted, {sequences, 2});
  check_shape(operation, "first_row", rows.first_row, {sequences + 1});
  check_shape(operation, "parents", rows.parents, {count});
  check_shape(operation, "tokens", rows.tokens, {count});
  for (const Tensor* x : {&accepted, &rows.first_row, &rows.parents, &rows.tokens})
    check_dtype(operation, "drafts", *x, DType::i32);
  return sequences;
}

}  // namespace

void draw(const Context& ctx, const Tensor& x, const Tensor& u, Tensor tokens) {
  check_rows("draw", x);
  check_shape("draw", "u", u, {x.rows(), tokens.cols()});
  check_shape("draw", "tokens", tokens, {x.rows(), tokens.cols()});
  check_dtype("draw", "u", u, DType::f32);
  check_dtype("draw", "tokens", tokens, DType::i32);
  if (tokens.cols() > kMaxDecodeRows)
    throw ShapeError(fmt::format("draw: {} tokens of a row, at most {}", tokens.cols(), kMaxDecodeRows));
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::draw(ctx, x, u, tokens);
  return cpu::draw(ctx, x, u, tokens);
}

void accept_rejection(const Context& ctx, const DraftRows& rows, const Tensor& p, Tensor accepted) {
  const int64_t sequences = check_drafts("accept_rejection", rows, p, accepted);
  for (const Tensor* x : {&rows.accept, &rows.next}) {
    check_shape("accept_rejection", "uniform numbers", *x, {p.rows()});
    check_dtype("accept_rejection", "uniform numbers", *x, DType::f32);
  }
  check_shape("accept_rejection", "q", rows.q, {p.rows()});
  check_dtype("accept_rejection", "q", rows.q, DType::i64);
  const ArenaScope scope(*ctx.scratch);
  const int64_t at_once = ctx.device.is_cuda() ? sequences : 1;
  const Tensor left = ctx.scratch->allocate("what rejections leave", DType::f32, {2 * at_once, p.cols()});
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::accept_rejection(ctx, rows, p, left, accepted);
  return cpu::accept_rejection(ctx, rows, p, left, accepted);
}

void accept_typical(const Context& ctx, const DraftRows& rows, const Tensor& logits, const Tensor& p,
                    const TypicalRule& rule, Tensor accepted) {
  check_drafts("accept_typical", rows, p, accepted);
  check_shape("accept_typical", "logits", logits, p.shape);
  check_dtype("accept_typical", "logits", logits, DType::f32);
  const ArenaScope scope(*ctx.scratch);
  if (ctx.device.is_cuda()) {
    const Tensor likeliest = ctx.scratch->allocate("likeliest tokens", DType::i32, {p.rows()});
    const Tensor entropies = ctx.scratch->allocate("entropies", DType::f32, {p.rows()});
    if (ctx.rehearsal) return;
    if constexpr (kCudaEnabled)
      return cuda::accept_typical(ctx, rows, logits, p, rule, likeliest, entropies, accepted);
  }
  if (ctx.rehearsal) return;
  return cpu::accept_typical(ctx, rows, logits, p, rule, accepted);
}

}  // namespace kernels

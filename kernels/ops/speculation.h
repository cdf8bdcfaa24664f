#pragma once
// Drafts that are drawn from a drafter's distribution, and which drafts of a step the target accepts.
//   draw              tokens[i, r]: drawn in proportion to row i of x without the tokens drawn before it: the
//                     first index at which the running sum of what is positive exceeds u[i, r] times the
//                     whole sum; -1 where nothing is left. x (N, V) fp32, u (N, R) fp32 in [0, 1), tokens (N,
//                     R) int32
//   accept_rejection, for each of B sequences where the accepted path of its draft tree ends, a row counted
//   accept_typical    from its first, and the token that follows: accepted (B, 2) int32. A sequence without
//                     rows is left out. p (N, V) fp32: the target's distribution after each row; of typical
//                     acceptance, softmax(logits / temperature)
//
// rejection (Leviathan et al. 2023, Chen et al. 2023; siblings: Chen et al. 2024, Sequoia): siblings x in
// order
//   are accepted with min(1, p(x) / q(x)), otherwise p <- norm(max(p - q, 0)) and q <- q without x,
//   renormalised. No sibling left: the next token is drawn from p. A deterministic draft has q = delta(x).
//   The tokens are distributed exactly as by plain sampling.
// typical (Cai et al. 2024): a draft is accepted if p(x) > min(epsilon, delta exp(-H(p))), H in nats; the
//   longest accepted path, ties by likelihood; the next token is the argmax. Not lossless.
//
// The CPU adds in double precision, a GPU in single: they draw the same token unless the uniform number lies
// within rounding of the border between two.
#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace kernels {

// The drafts of a step, row by row, in memory that the device can read.
struct DraftRows {
  Tensor first_row;  // (B + 1) int32: sequence b owns rows [first_row[b], first_row[b + 1])
  Tensor parents;  // (N) int32: counted from the sequence's first row, which is its root; parents come first
  Tensor tokens;   // (N) int32
  // Of rejection:
  Tensor accept;  // (N) fp32 in [0, 1): decides whether the row's draft is accepted
  Tensor next;    // (N) fp32 in [0, 1): draws the token after the row
  Tensor q;       // (N) int64: where the distribution (V) fp32 is that the draft was drawn from; 0: none
};

struct TypicalRule {
  double temperature = 1, epsilon = 0.09, delta = 0.3;
};

void draw(const Context& ctx, const Tensor& x, const Tensor& u, Tensor tokens);
void accept_rejection(const Context& ctx, const DraftRows& rows, const Tensor& p, Tensor accepted);
void accept_typical(const Context& ctx, const DraftRows& rows, const Tensor& logits, const Tensor& p,
                    const TypicalRule& rule, Tensor accepted);

// `left` fp32 holds what rejections leave of p and of q: (2, V), on a GPU (2 B, V). `likeliest` (N) int32,
// `entropies` (N) fp32.
namespace cpu {
void draw(const Context& ctx, const Tensor& x, const Tensor& u, Tensor tokens);
void accept_rejection(const Context& ctx, const DraftRows& rows, const Tensor& p, const Tensor& left,
                      Tensor accepted);
void accept_typical(const Context& ctx, const DraftRows& rows, const Tensor& logits, const Tensor& p,
                    const TypicalRule& rule, Tensor accepted);
}  // namespace cpu

namespace cuda {
void draw(const Context& ctx, const Tensor& x, const Tensor& u, Tensor tokens);
void accept_rejection(const Context& ctx, const DraftRows& rows, const Tensor& p, const Tensor& left,
                      Tensor accepted);
void accept_typical(const Context& ctx, const DraftRows& rows, const Tensor& logits, const Tensor& p,
                    const TypicalRule& rule, const Tensor& likeliest, const Tensor& entropies,
                    Tensor accepted);
}  // namespace cuda

}  // namespace kernels

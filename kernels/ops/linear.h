#pragma once
// Linear layer: y = x W^T + b, and its gradients.
//
//   forward    y (N, O) = x (N, I) W^T + b          W (O, I), b (O) or absent
//   backward   dx (N, I)  = dy W                    written, or accumulated with += on request
//              dW (O, I) += dy^T x                  accumulated, in the main type (fp32)
//              db (O)    += sum over rows of dy     accumulated, in the main type
//
// dtypes: x, W, dy, dx in one compute type; y in the compute type or fp32 (logits). Sums are held in fp32
// (fp64 for fp64). Rows may be strided.
//
// Two ways of computing the forward:
//  - a matrix product over any number of rows (training), and
//  - when `panels` is present and N <= kMaxDecodeRows, a row-invariant kernel: row i of y depends on row i of
//  x alone,
//    bit for bit, whatever N is and whichever rows stand beside it. This is what makes greedy speculative
//    decoding identical to plain decoding.
#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace kernels {

inline constexpr int64_t kMaxDecodeRows = 64;
inline constexpr int64_t kPanelRows = 32;

struct LinearWeight {
  Tensor matrix;  // (O, I)
  Tensor bias;    // (O), or empty
  Tensor panels;  // (ceil(O / 32), I, 32) from pack_panels, or empty
};

// panels[p, i, r] = W[32 p + r, i]; rows beyond O are zero.
void pack_panels(const Context& ctx, const Tensor& matrix, Tensor& panels);
Shape panels_shape(const Tensor& matrix);

void linear(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor y);
// dx = dy W, or dx += dy W.
void linear_backward_input(const Context& ctx, const Tensor& dy, const Tensor& matrix, Tensor dx,
                           bool accumulate = false);
// dW += dy^T x; db += column sums of dy (dbias may be empty).
void linear_backward_weight(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dw,
                            Tensor dbias = {});

namespace cpu {
void pack_panels(const Context& ctx, const Tensor& matrix, Tensor& panels);
void linear(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor y);
void linear_rows(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor y);
void linear_backward_input(const Context& ctx, const Tensor& dy, const Tensor& matrix, Tensor dx,
                           bool accumulate);
void linear_backward_weight(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dw, Tensor dbias);
}  // namespace cpu

}  // namespace kernels

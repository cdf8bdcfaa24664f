#pragma once
// Linear layer: y = x W^T + b, and its gradients.
//
//   forward    y (N, O) = x (N, I) W^T + b          W (O, I), b (O) or absent
//   backward   dx (N, I)  = dy W                    written, or accumulated with += on request
//              dW (O, I) += dy^T x                  accumulated, or written on request
//              db (O)    += sum over rows of dy     accumulated; both in the main type (fp32)
//
// and the same fused with GPT-2's activation (gelu of ops/activation.h), for an MLP y2 = gelu(x W1^T) W2^T:
//
//   linear_gelu                  pre = x W^T + b, y = gelu(pre)      pre is saved for the backward
//   linear_backward_input_gelu   dpre = (dy W) * gelu'(pre)          written; W is the layer behind the gelu
//
// or with the residual that its result is added to:
//
//   linear_add                   y = x W^T + b + residual            y is not the residual; the product may
//   be
//                                                                    rounded before it is added
//
// dtypes: x, W, dy, dx, pre, dpre, residual in one compute type; y in the compute type or fp32 (logits). Sums
// are held in fp32 (fp64 for fp64). Rows may be strided.
//
// Two ways of computing the forward:
//  - a matrix product over any number of rows (training), and
//  - when `panels` is present and N <= kMaxDecodeRows, a row-invariant kernel: row i of y depends on row i of
//  x alone,
//    bit for bit, whatever N is and whichever rows stand beside it. This is what makes greedy speculative
//    decoding identical to plain decoding.
#include "kernels/core/context.h"
#include "kernels/core/tensor.h"
#include "kernels/ops/norm.h"

namespace kernels {

inline constexpr int64_t kMaxDecodeRows = 64;

struct LinearWeight {
  Tensor matrix;  // (O, I)
  Tensor bias;    // (O), or empty
  Tensor panels;  // panels_shape(matrix), from pack_panels; or empty
  // With a gain, linear and linear_gelu read norm(x) (ops/norm.h) instead of x, with working memory from
  // ctx.scratch.
  struct {
    NormParams params;
    Tensor gain, bias;
    Tensor sums;  // (O, 2) in the main type, from pack_norm; or empty
  } norm = {};
};

// The matrix, padded with zeros, in the order in which its device's row-invariant kernel reads it:
//   CPU   (ceil(O / 32), I, 32)               panels[p, i, r] = W[32 p + r, i]
//   GPU   (ceil(O / 16), ceil(I / 32), 512)   tiles of 16 rows and 32 columns, each in the order of the
//   matrix
//                                             units (kernels/cuda/linear_pack.cu)
void pack_panels(const Context& ctx, const Tensor& matrix, Tensor& panels);
Shape panels_shape(const Tensor& matrix);

// sums[o] = (sum of W[o, i] gain[i], sum of W[o, i] bias[i] + the layer's bias[o]) over i, with w.norm's gain
// and bias; either bias may be empty. It is what a GPU's row-invariant kernel has to know beforehand to
// compute the norm as well. Without, the norm is an operation of its own; on the CPU it always is.
void pack_norm(const Context& ctx, const LinearWeight& w, Tensor& sums);
// Whether linear and linear_gelu compute the norm of x in such a kernel.
bool computes_norm(Device device, const Tensor& x, const LinearWeight& w);

void linear(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor y);
// `pre` may be empty where no backward follows.
void linear_gelu(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor pre, Tensor y);
void linear_add(const Context& ctx, const Tensor& x, const LinearWeight& w, const Tensor& residual, Tensor y);
// dx = dy W, or dx += dy W.
void linear_backward_input(const Context& ctx, const Tensor& dy, const Tensor& matrix, Tensor dx,
                           bool accumulate = false);
void linear_backward_input_gelu(const Context& ctx, const Tensor& dy, const Tensor& matrix, const Tensor& pre,
                                Tensor dpre);
// dW += dy^T x, or dW = dy^T x whatever dW held; db += column sums of dy (dbias may be empty).
void linear_backward_weight(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dw,
                            Tensor dbias = {}, bool accumulate = true);
// Of it db alone.
void linear_backward_bias(const Context& ctx, const Tensor& dy, Tensor dbias);

// On a GPU the first product of each kind (sizes, strides, types) times the library's kernels and remembers
// the fastest for the life of the process; inside a graph capture, and when switched off here, it takes the
// library's first suggestion, which is the same in every process.
void measure_products(bool on);
bool products_are_measured();
// GPU memory that the first product on a device takes, for good, to work in; products of one device share it,
// so they go to one stream or to streams that wait for one another. 0 on the CPU.
size_t product_workspace_bytes(Device device);

namespace cpu {
inline constexpr int64_t kPanelRows = 32;
void pack_panels(const Context& ctx, const Tensor& matrix, Tensor& panels);
void pack_norm(const Context& ctx, const LinearWeight& w, Tensor& sums);
void linear(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor y);
void linear_rows(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor y);
void linear_gelu(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor pre, Tensor y);
void linear_backward_input(const Context& ctx, const Tensor& dy, const Tensor& matrix, Tensor dx,
                           bool accumulate);
void linear_backward_input_gelu(const Context& ctx, const Tensor& dy, const Tensor& matrix, const Tensor& pre,
                                Tensor dpre);
void linear_backward_weight(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dw, Tensor dbias,
                            bool accumulate);
void linear_backward_bias(const Context& ctx, const Tensor& dy, Tensor dbias);
}  // namespace cpu

namespace cuda {
inline constexpr int64_t kTileRows = 16, kTileColumns = 32;
void pack_panels(const Context& ctx, const Tensor& matrix, Tensor& panels);
void pack_norm(const Context& ctx, const LinearWeight& w, Tensor& sums);
void linear(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor y);
// Whether linear_rows computes the norm of x itself. It depends on the layer alone, never on how many rows
// there are.
bool linear_rows_norms(const Tensor& x, const LinearWeight& w);
// With `gelu`, y = gelu(x W^T + b); with a residual, it is added before the sum is rounded.
void linear_rows(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor y, bool gelu = false,
                 const Tensor& residual = {});
void linear_gelu(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor pre, Tensor y);
void linear_add(const Context& ctx, const Tensor& x, const LinearWeight& w, const Tensor& residual, Tensor y);
void linear_backward_input(const Context& ctx, const Tensor& dy, const Tensor& matrix, Tensor dx,
                           bool accumulate);
void linear_backward_input_gelu(const Context& ctx, const Tensor& dy, const Tensor& matrix, const Tensor& pre,
                                Tensor dpre);
void linear_backward_weight(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dw, Tensor dbias,
                            bool accumulate);
void linear_backward_bias(const Context& ctx, const Tensor& dy, Tensor dbias);
}  // namespace cuda

}  // namespace kernels

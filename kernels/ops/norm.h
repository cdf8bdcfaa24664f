#pragma once
// RMSNorm and LayerNorm over groups of columns.
//   rms     y = x * r * g                r = 1 / sqrt(mean(x^2) + eps)
//   layer   y = (x - m) * r * g + b      m = mean(x), r = 1 / sqrt(var(x) + eps)
// x (N, G * E) is normalised in G groups of E columns each (G = 1 for the usual norm, G = heads for a
// per-head norm); gain and bias (G * E) cover all columns. x may be of the main type (fp32) while y is of the
// compute type. Saved: statistics (N, G, 2) in the main type: mean (0 for rms) and r. Backward: dx written
// (or +=, so that a residual's gradient and a branch's meet in one pass); dgain, dbias += in the main type,
// dbias with dgain only. Statistics and sums are fp32. On a GPU norm_backward takes the shares of dgain and
// dbias from ctx.scratch. Source: Zhang & Sennrich 2019 (RMSNorm); Ba et al. 2016 (LayerNorm).
#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace kernels {

enum class NormKind { rms, layer };

struct NormParams {
  NormKind kind = NormKind::rms;
  int64_t groups = 1;
  float eps = 1e-5f;
};

void norm(const Context& ctx, const NormParams& params, const Tensor& x, const Tensor& gain,
          const Tensor& bias, Tensor y, Tensor statistics);
// residual' = residual + branch (rounded to the compute type, written to sum), y = norm(sum). One pass.
void residual_norm(const Context& ctx, const NormParams& params, const Tensor& residual, const Tensor& branch,
                   const Tensor& gain, const Tensor& bias, Tensor sum, Tensor y, Tensor statistics);
void norm_backward(const Context& ctx, const NormParams& params, const Tensor& dy, const Tensor& x,
                   const Tensor& gain, const Tensor& statistics, Tensor dx, bool accumulate, Tensor dgain,
                   Tensor dbias);

namespace cpu {
void norm(const Context& ctx, const NormParams& params, const Tensor& x, const Tensor& gain,
          const Tensor& bias, Tensor y, Tensor statistics);
void residual_norm(const Context& ctx, const NormParams& params, const Tensor& residual, const Tensor& branch,
                   const Tensor& gain, const Tensor& bias, Tensor sum, Tensor y, Tensor statistics);
void norm_backward(const Context& ctx, const NormParams& params, const Tensor& dy, const Tensor& x,
                   const Tensor& gain, const Tensor& statistics, Tensor dx, bool accumulate, Tensor dgain,
                   Tensor dbias);
}  // namespace cpu

namespace cuda {
void norm(const Context& ctx, const NormParams& params, const Tensor& x, const Tensor& gain,
          const Tensor& bias, Tensor y, Tensor statistics);
void residual_norm(const Context& ctx, const NormParams& params, const Tensor& residual, const Tensor& branch,
                   const Tensor& gain, const Tensor& bias, Tensor sum, Tensor y, Tensor statistics);
void norm_backward(const Context& ctx, const NormParams& params, const Tensor& dy, const Tensor& x,
                   const Tensor& gain, const Tensor& statistics, Tensor dx, bool accumulate, Tensor dgain,
                   Tensor dbias);
}  // namespace cuda

}  // namespace kernels

#include "kernels/ops/norm.h"

#include <fmt/format.h>

namespace kernels {

namespace {

// x (N, G E) in the compute type or its main type against y's side, which the gain and bias share.
void check_common(const char* operation, const NormParams& params, const Tensor& x, const Tensor& y,
                  const char* y_name, const Tensor& gain, const Tensor& bias) {
  if (params.groups < 1 || x.cols() % params.groups != 0)
    throw ShapeError(
        fmt::format("{}: {} columns do not divide into {} groups", operation, x.cols(), params.groups));
  check_shape(operation, y_name, y, x.shape);
  if (x.dtype != y.dtype) check_dtype(operation, "x", x, main_dtype(y.dtype));
  check_shape(operation, "gain", gain, Shape{x.cols()});
  check_dtype(operation, "gain", gain, y.dtype);
  if (!bias) return;
  check_shape(operation, "bias", bias, Shape{x.cols()});
  check_dtype(operation, "bias", bias, y.dtype);
}

void check_statistics(const char* operation, const NormParams& params, const Tensor& statistics,
                      const Tensor& y) {
  check_shape(operation, "statistics", statistics, Shape{y.rows(), params.groups, 2});
  check_dtype(operation, "statistics", statistics, main_dtype(y.dtype));
}

}  // namespace

void norm(const Context& ctx, const NormParams& params, const Tensor& x, const Tensor& gain,
          const Tensor& bias, Tensor y, Tensor statistics) {
  check_common("norm", params, x, y, "y", gain, bias);
  if (statistics) check_statistics("norm", params, statistics, y);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda()) return cuda::norm(ctx, params, x, gain, bias, y, statistics);
  return cpu::norm(ctx, params, x, gain, bias, y, statistics);
}

void residual_norm(const Context& ctx, const NormParams& params, const Tensor& residual, const Tensor& branch,
                   const Tensor& gain, const Tensor& bias, Tensor sum, Tensor y, Tensor statistics) {
  constexpr auto kName = "residual_norm";
  check_common(kName, params, sum, y, "y", gain, bias);
  for (const auto& [name, t] : {std::pair{"residual", &residual}, {"branch", &branch}, {"sum", &sum}}) {
    check_shape(kName, name, *t, y.shape);
    check_dtype(kName, name, *t, y.dtype);
  }
  if (statistics) check_statistics(kName, params, statistics, y);
  if (ctx.rehearsal) return;
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda())
      return cuda::residual_norm(ctx, params, residual, branch, gain, bias, sum, y, statistics);
  return cpu::residual_norm(ctx, params, residual, branch, gain, bias, sum, y, statistics);
}

void norm_backward(const Context& ctx, const NormParams& params, const Tensor& dy, const Tensor& x,
                   const Tensor& gain, const Tensor& statistics, Tensor dx, bool accumulate, Tensor dgain,
                   Tensor dbias) {
  constexpr auto kName = "norm_backward";
  check_common(kName, params, x, dy, "dy", gain, {});
  check_statistics(kName, params, statistics, dy);
  check_shape(kName, "dx", dx, x.shape);
  if (dx.dtype != dy.dtype) check_dtype(kName, "dx", dx, x.dtype);
  if (dbias && !dgain) throw ShapeError("norm_backward: dbias is written with dgain only");
  for (const auto& [name, t] : {std::pair{"dgain", &dgain}, {"dbias", &dbias}}) {
    if (!*t) continue;
    check_shape(kName, name, *t, gain.shape);
    check_dtype(kName, name, *t, main_dtype(dy.dtype));
  }
  if constexpr (kCudaEnabled)
    if (ctx.device.is_cuda())
      return cuda::norm_backward(ctx, params, dy, x, gain, statistics, dx, accumulate, dgain, dbias);
  if (ctx.rehearsal) return;
  return cpu::norm_backward(ctx, params, dy, x, gain, statistics, dx, accumulate, dgain, dbias);
}

}  // namespace kernels

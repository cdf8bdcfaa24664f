#include "kernels/cuda/device/map.cuh"
#include "kernels/ops/cast.h"

namespace kernels::cuda {

namespace {

struct Copy {
  static constexpr int kInputs = 1, kOutputs = 1;
  __device__ void operator()(const float (&in)[1], float (&out)[1]) const { out[0] = in[0]; }
};

struct Fill {
  static constexpr int kInputs = 0, kOutputs = 1;
  float value;
  __device__ void operator()(const float (&)[1], float (&out)[1]) const { out[0] = value; }
};

}  // namespace

// Anything may be read from fp64 and widened to it, by way of fp32.
void cast(const Context& ctx, const Tensor& x, Tensor y) {
  const auto map = [&](auto from, auto to) {
    map_rows<Copy, decltype(from), decltype(to)>(ctx, "cast", {x}, {y});
  };
  if (x.dtype == DType::f64) return visit_device_dtype(y.dtype, [&](auto to) { map(double{}, to); });
  if (y.dtype == DType::f64) return visit_device_dtype(x.dtype, [&](auto from) { map(from, double{}); });
  visit_device_dtype(x.dtype,
                     [&](auto from) { visit_device_dtype(y.dtype, [&](auto to) { map(from, to); }); });
}

void fill(const Context& ctx, Tensor y, float value) {
  visit_device_dtype(y.dtype,
                     [&](auto tag) { map_rows<Fill, decltype(tag)>(ctx, "fill", {}, {y}, Fill{value}); });
}

}  // namespace kernels::cuda

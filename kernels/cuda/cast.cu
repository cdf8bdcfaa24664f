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

void cast(const Context& ctx, const Tensor& x, Tensor y) {
  visit_device_dtype(x.dtype, [&](auto from) {
    visit_device_dtype(y.dtype,
                       [&](auto to) { map_rows<Copy, decltype(from), decltype(to)>(ctx, "cast", {x}, {y}); });
  });
}

void fill(const Context& ctx, Tensor y, float value) {
  visit_device_dtype(y.dtype,
                     [&](auto tag) { map_rows<Fill, decltype(tag)>(ctx, "fill", {}, {y}, Fill{value}); });
}

}  // namespace kernels::cuda

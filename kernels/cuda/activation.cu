#include "kernels/cuda/device/functions.cuh"
#include "kernels/cuda/device/map.cuh"
#include "kernels/ops/activation.h"

namespace kernels::cuda {

namespace {

// Gradients take (dy, x) or (dy, gate, up).
struct Gelu {
  static constexpr int kInputs = 1, kOutputs = 1;
  static constexpr float kCubic = 0.044715f, kTwiceRoot = 2 * 0.79788456080286535588f;
  // The tanh form equals x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3).
  __device__ static float gate(float x) { return sigmoid(kTwiceRoot * x * fmaf(kCubic * x, x, 1.0f)); }
  __device__ void operator()(const float (&in)[1], float (&out)[1]) const { out[0] = in[0] * gate(in[0]); }
};

struct GeluGradient {
  static constexpr int kInputs = 2, kOutputs = 1;
  __device__ void operator()(const float (&in)[2], float (&out)[1]) const {
    const float x = in[1], s = Gelu::gate(x);
    const float tail = x * (s * (1.0f - s)) * Gelu::kTwiceRoot;
    out[0] = in[0] * fmaf(tail, fmaf(3 * Gelu::kCubic * x, x, 1.0f), s);
  }
};

__device__ float silu_slope(float x, float s) { return s * fmaf(x, 1.0f - s, 1.0f); }

struct SiluAdd {
  static constexpr int kInputs = 2, kOutputs = 1;
  __device__ void operator()(const float (&in)[2], float (&out)[1]) const {
    out[0] = in[0] + in[1] * sigmoid(in[1]);
  }
};

struct SiluGradient {
  static constexpr int kInputs = 2, kOutputs = 1;
  __device__ void operator()(const float (&in)[2], float (&out)[1]) const {
    out[0] = in[0] * silu_slope(in[1], sigmoid(in[1]));
  }
};

struct Add {
  static constexpr int kInputs = 2, kOutputs = 1;
  __device__ void operator()(const float (&in)[2], float (&out)[1]) const { out[0] = in[0] + in[1]; }
};

struct Swiglu {
  static constexpr int kInputs = 2, kOutputs = 1;
  __device__ void operator()(const float (&in)[2], float (&out)[1]) const {
    out[0] = in[0] * sigmoid(in[0]) * in[1];
  }
};

struct SwigluGradient {
  static constexpr int kInputs = 3, kOutputs = 2;
  __device__ void operator()(const float (&in)[3], float (&out)[2]) const {
    const float dy = in[0], a = in[1], b = in[2], s = sigmoid(a);
    out[0] = dy * b * silu_slope(a, s);
    out[1] = dy * (a * s);
  }
};

template <class Op>
void map(const Context& ctx, const char* name, const std::array<Tensor, Op::kInputs>& in,
         const std::array<Tensor, Op::kOutputs>& out) {
  visit_device_dtype(out[0].dtype, [&](auto tag) { map_rows<Op, decltype(tag)>(ctx, name, in, out); });
}

}  // namespace

void swiglu(const Context& ctx, const Tensor& x, Tensor y) {
  const int64_t width = y.cols();
  map<Swiglu>(ctx, "swiglu", {x.columns(0, width), x.columns(width, width)}, {y});
}
void swiglu_backward(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dx) {
  const int64_t width = dy.cols();
  map<SwigluGradient>(ctx, "swiglu_backward", {dy, x.columns(0, width), x.columns(width, width)},
                      {dx.columns(0, width), dx.columns(width, width)});
}
void gelu(const Context& ctx, const Tensor& x, Tensor y) { map<Gelu>(ctx, "gelu", {x}, {y}); }
void gelu_backward(const Context& ctx, const Tensor& dy, const Tensor& x, Tensor dx) {
  map<GeluGradient>(ctx, "gelu_backward", {dy, x}, {dx});
}
void silu_add(const Context& ctx, const Tensor& x, const Tensor& u, Tensor y) {
  map<SiluAdd>(ctx, "silu_add", {x, u}, {y});
}
void silu_add_backward(const Context& ctx, const Tensor& dy, const Tensor& u, Tensor du) {
  map<SiluGradient>(ctx, "silu_add_backward", {dy, u}, {du});
}
void add(const Context& ctx, const Tensor& a, const Tensor& b, Tensor y) {
  map<Add>(ctx, "add", {a, b}, {y});
}

}  // namespace kernels::cuda

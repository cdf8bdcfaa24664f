#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>

#include "kernels/cuda/device/map.cuh"
#include "kernels/ops/rotary.h"

namespace kernels::cuda {

namespace {

constexpr int kThreads = 256, kLargestHalf = 256;
constexpr int kAhead = 3;  // heads loaded before the first is rotated

// Whole turns of the angle from one position to the next, theta^(-d / half) / 2 pi, computed on the host.
struct Rates {
  double at[kLargestHalf];
};

struct RotaryArguments {
  int64_t stride, rows;
  const int32_t* positions;
  int half, heads;
  uint32_t vectors;      // of a half
  int heads_per_thread;  // which share their angles
  uint32_t groups;       // of heads
  float direction;
};

// Whole turns are taken off in fp64; what is left is exact to half a unit of fp32.
__device__ __forceinline__ void cosine_sine(double turns, float direction, float& c, float& s) {
  sincospif(2 * static_cast<float>(turns - rint(turns)), &s, &c);
  s *= direction;
}

// A thread rotates N pairs of columns of one row in several heads.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(T* x, const RotaryArguments a, const __grid_constant__ Rates rates) {
  const uint32_t unit = blockIdx.x * kThreads + threadIdx.x;  // no tensor has 2^32 of them
  const int vector = unit % a.vectors, group = unit / a.vectors % a.groups;
  const int64_t row = unit / a.vectors / a.groups;
  let_next_start();
  wait_for_previous();
  if (row >= a.rows) return;
  const double position = a.positions[row];
  const int d = vector * N;
  float c[N], s[N];
#pragma unroll
  for (int j = 0; j < N; ++j) cosine_sine(position * rates.at[d + j], a.direction, c[j], s[j]);
  const int first = group * a.heads_per_thread, last = min(a.heads, first + a.heads_per_thread);
  for (int h = first; h < last; h += kAhead) {
    T* at = x + row * a.stride + int64_t{h} * 2 * a.half + d;
    Vector<T, N> low[kAhead], high[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (h + k >= last) break;
      low[k] = load_vector<T, N>(at + k * 2 * a.half);
      high[k] = load_vector<T, N>(at + k * 2 * a.half + a.half);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (h + k >= last) break;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float u = to_float(low[k].at[j]), v = to_float(high[k].at[j]);
        low[k].at[j] = from_float<T>(fmaf(-v, s[j], u * c[j]));
        high[k].at[j] = from_float<T>(fmaf(u, s[j], v * c[j]));
      }
      store_global(at + k * 2 * a.half, low[k]);
      store_global(at + k * 2 * a.half + a.half, high[k]);
    }
  }
}

template <typename T, int N>
void rotate(const Context& ctx, const Tensor& x, RotaryArguments a, const Rates& rates) {
  // Angles cost more than the rotation: heads share them as long as the chip stays full.
  constexpr int64_t kFull = int64_t{1} << 18;
  a.vectors = static_cast<uint32_t>(a.half / N);
  const int64_t all = a.rows * a.heads * a.vectors;
  a.heads_per_thread = static_cast<int>(std::clamp<int64_t>(all / kFull, 1, a.heads));
  a.groups = static_cast<uint32_t>((a.heads + a.heads_per_thread - 1) / a.heads_per_thread);
  const int64_t units = a.rows * a.vectors * a.groups;
  const auto blocks = static_cast<unsigned>((units + kThreads - 1) / kThreads);
  launch(ctx, "rotary", {.grid = blocks, .block = kThreads, .dependent = starts_early(blocks)},
         rotary_kernel<T, N>, static_cast<T*>(x.data), a, rates);
}

}  // namespace

void rotary(const Context& ctx, Tensor x, const Tensor& positions, float theta, int direction) {
  const int64_t half = x.dim(2) / 2;
  if (half > kLargestHalf)
    throw ShapeError("rotary: heads of " + std::to_string(x.dim(2)) + " columns, at most " +
                     std::to_string(2 * kLargestHalf) + " on a GPU");
  if (x.numel() == 0) return;
  Rates rates;
  for (int64_t d = 0; d < half; ++d)
    rates.at[d] = std::pow(static_cast<double>(theta), -static_cast<double>(d) / static_cast<double>(half)) /
                  (2 * std::numbers::pi);
  RotaryArguments a{};
  a.stride = x.row_stride;
  a.rows = x.rows();
  a.positions = positions.as<int32_t>();
  a.half = static_cast<int>(half);
  a.heads = static_cast<int>(x.dim(1));
  a.direction = static_cast<float>(direction);
  visit_device_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int kWide = kVectorElements<T>;
    if (half % kWide == 0 && rows_aligned(x, 16))
      rotate<T, kWide>(ctx, x, a, rates);
    else
      rotate<T, 1>(ctx, x, a, rates);
  });
}

}  // namespace kernels::cuda

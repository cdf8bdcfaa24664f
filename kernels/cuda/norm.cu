#include <algorithm>

#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/norm_rows.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/ops/norm.h"

namespace kernels::cuda {

namespace {

struct Forward {
  const void *x, *branch, *gain, *bias;  // y = norm(x), or sum = x + branch, y = norm(sum)
  void *sum, *y;
  float* statistics;
  int64_t x_stride, branch_stride, sum_stride, y_stride, statistics_stride;
  int64_t rows;
  int columns;  // of a group
  bool layer;
  float eps, inverse;  // 1 / columns
};

template <typename X, typename Y>
struct ForwardRow {
  const X* x;
  const Y *branch, *gain, *bias;
  Y *sum, *y;
  __device__ ForwardRow(const Forward& f, int64_t row, int group) {
    const int64_t column = int64_t{group} * f.columns;
    x = static_cast<const X*>(f.x) + row * f.x_stride + column;
    branch = static_cast<const Y*>(f.branch) + row * f.branch_stride + column;
    gain = static_cast<const Y*>(f.gain) + column;
    bias = f.bias ? static_cast<const Y*>(f.bias) + column : nullptr;
    sum = static_cast<Y*>(f.sum) + row * f.sum_stride + column;
    y = static_cast<Y*>(f.y) + row * f.y_stride + column;
  }
};

__device__ __forceinline__ void save_statistics(const Forward& f, int64_t row, int group, float mean,
                                                float r) {
  if (!f.statistics) return;
  float* at = f.statistics + row * f.statistics_stride + 2 * group;
  at[0] = mean;
  at[1] = r;
}

// x / n, where `inverse` is 1 / n: exact where the quotient is.
__device__ __forceinline__ float divided(float x, float n, float inverse) {
  const float quotient = x * inverse;
  return fmaf(fmaf(-quotient, n, x), inverse, quotient);
}

constexpr int kMostThreads = 384;  // of a block

// This thread's vectors of a row, zeros outside it. A residual and a branch become their sum here.
template <class S, typename X, typename Y, bool kResidual>
__device__ __forceinline__ void load_row(const ForwardRow<X, Y>& at, int vectors,
                                         Vector<X, kNormElements<X, Y>> (&x)[S::kVectors]) {
  constexpr int N = kNormElements<X, Y>;
  Vector<Y, N> branch[kResidual ? S::kVectors : 1];
  const auto vector = [](int k) { return k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x); };
#pragma unroll
  for (int k = 0; k < S::kVectors; ++k) {
    x[k] = {};
    if (vector(k) >= vectors) continue;
    x[k] = load_vector<X, N>(at.x + vector(k) * N);
    if constexpr (kResidual) branch[k] = load_vector<Y, N>(at.branch + vector(k) * N);
  }
  if constexpr (kResidual)
#pragma unroll
    for (int k = 0; k < S::kVectors; ++k) {
      if (vector(k) >= vectors) continue;
#pragma unroll
      for (int j = 0; j < N; ++j)
        x[k].at[j] = from_float<Y>(to_float(x[k].at[j]) + to_float(branch[k].at[j]));
      store_global(at.sum + vector(k) * N, x[k]);
    }
}

// A group of a row stays in the registers of blockDim.x threads. Many warps with a row each keep as much in
// flight as warps that fetch ahead would: here nothing is carried from row to row.
// kEarly: gain and bias are fetched while the kernel ahead still runs, into registers that many rows need for
// more warps.
template <class S, typename X, typename Y, bool kResidual, bool kEarly>
__global__ void __launch_bounds__(kMostThreads, kEarly ? 1 : 2)
    forward_kernel(const Forward f, int all_vectors) {
  constexpr int N = kNormElements<X, Y>;
  __shared__ __align__(16) float shared[S::kWholeWarps ? kRowSums : 4];
  const int lanes = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x), group = blockIdx.y;
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const bool live = row < f.rows;
  const int vectors = live ? all_vectors : 0;
  let_next_start();
  const ForwardRow<X, Y> at(f, live ? row : 0, group);
  Vector<Y, N> gain[kEarly ? S::kVectors : 1], bias[kEarly ? S::kVectors : 1];
  if constexpr (kEarly) {
    load_parameters<S, N>(at.gain, 0, vectors, gain);
    load_parameters<S, N>(at.bias, 0, vectors, bias);
  }
  wait_for_previous();
  Vector<X, N> x[S::kVectors];
  load_row<S, X, Y, kResidual>(at, vectors, x);
  RowSums<S> sums(shared);
  float mean = 0, squares = 0;
  if (f.layer) {
#pragma unroll
    for (int k = 0; k < S::kVectors; ++k)
#pragma unroll
      for (int j = 0; j < N; ++j) mean += to_float(x[k].at[j]);
    mean = divided(sums(mean), static_cast<float>(f.columns), f.inverse);
  }
#pragma unroll
  for (int k = 0; k < S::kVectors; ++k)
    if (k * lanes + lane < vectors)
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float centred = to_float(x[k].at[j]) - mean;
        squares = fmaf(centred, centred, squares);
      }
  const float r = rsqrtf(fmaf(sums(squares), f.inverse, f.eps));
  if (!live) return;
  if (lane == 0) save_statistics(f, row, group, mean, r);
#pragma unroll
  for (int k = 0; k < S::kVectors; ++k) {
    const int c = (k * lanes + lane) * N;
    if (c >= f.columns) continue;
    const int i = kEarly ? k : 0;
    Vector<Y, N> y;
    if constexpr (!kEarly) {
      gain[0] = load_vector<Y, N>(at.gain + c);
      bias[0] = {};
      if (at.bias) bias[0] = load_vector<Y, N>(at.bias + c);
    }
#pragma unroll
    for (int j = 0; j < N; ++j)
      y.at[j] = from_float<Y>(
          fmaf((to_float(x[k].at[j]) - mean) * r, to_float(gain[i].at[j]), to_float(bias[i].at[j])));
    store_global(at.y + c, y);
  }
}

// Any width and any alignment: a block reads its row again for every sum.
template <typename X, typename Y, bool kResidual>
__global__ void __launch_bounds__(kAnyThreads) forward_any_kernel(const Forward f) {
  __shared__ float shared[33];
  const int group = blockIdx.y;
  const int64_t row = blockIdx.x;
  let_next_start();
  wait_for_previous();
  const ForwardRow<X, Y> at(f, row, group);
  const auto value = [&](int c) {
    if constexpr (kResidual)
      return to_float(from_float<Y>(to_float(at.x[c]) + to_float(at.branch[c])));
    else
      return to_float(at.x[c]);
  };
  float mean = 0, squares = 0;
  if (f.layer) {
    for (int c = threadIdx.x; c < f.columns; c += kAnyThreads) mean += value(c);
    mean = block_reduce<Sum>(mean, shared, 0.0f) / static_cast<float>(f.columns);
  }
  for (int c = threadIdx.x; c < f.columns; c += kAnyThreads) {
    const float centred = value(c) - mean;
    squares = fmaf(centred, centred, squares);
  }
  squares = block_reduce<Sum>(squares, shared, 0.0f);
  const float r = 1.0f / sqrtf(squares / static_cast<float>(f.columns) + f.eps);
  if (threadIdx.x == 0) save_statistics(f, row, group, mean, r);
  for (int c = threadIdx.x; c < f.columns; c += kAnyThreads) {
    const float x = value(c);
    // The sum may stand where the residual or the branch did: this element is read no more.
    if constexpr (kResidual) at.sum[c] = from_float<Y>(x);
    const float v = (x - mean) * r * to_float(at.gain[c]);
    at.y[c] = from_float<Y>(at.bias ? v + to_float(at.bias[c]) : v);
  }
}

template <typename X, typename Y, bool kResidual>
void launch_forward(const Context& ctx, const char* name, const Forward& f, int64_t groups, bool wide) {
  constexpr int N = kNormElements<X, Y>;
  visit_spread(f.columns, N, wide, [&](auto spread) {
    using S = decltype(spread);
    if constexpr (std::is_same_v<S, AnySpread>) {
      const dim3 grid(static_cast<unsigned>(f.rows), static_cast<unsigned>(groups));
      launch(ctx, name, {.grid = grid, .block = kAnyThreads, .dependent = starts_early(grid.x * grid.y)},
             forward_any_kernel<X, Y, kResidual>, f);
    } else {
      const int vectors = f.columns / N;
      const dim3 block = row_block<S>(f.rows, vectors);
      const dim3 grid(static_cast<unsigned>((f.rows + block.y - 1) / block.y), static_cast<unsigned>(groups));
      const bool early = starts_early(grid.x * grid.y);
      launch(ctx, name, {.grid = grid, .block = block, .dependent = early},
             early ? forward_kernel<S, X, Y, kResidual, true> : forward_kernel<S, X, Y, kResidual, false>, f,
             vectors);
    }
  });
}

Forward forward_of(const NormParams& params, const Tensor& gain, const Tensor& bias, const Tensor& y,
                   const Tensor& statistics) {
  Forward f{};
  f.gain = gain.data;
  f.bias = bias.data;
  f.y = y.data;
  f.y_stride = y.row_stride;
  f.statistics = statistics ? statistics.as<float>() : nullptr;
  f.statistics_stride = statistics.row_stride;
  f.rows = y.rows();
  f.columns = static_cast<int>(y.cols() / params.groups);
  f.inverse = 1.0f / static_cast<float>(f.columns);
  f.layer = params.kind == NormKind::layer;
  f.eps = params.eps;
  return f;
}

}  // namespace

void norm(const Context& ctx, const NormParams& params, const Tensor& x, const Tensor& gain,
          const Tensor& bias, Tensor y, Tensor statistics) {
  if (y.numel() == 0) return;
  Forward f = forward_of(params, gain, bias, y, statistics);
  f.x = x.data;
  f.x_stride = x.row_stride;
  visit_norm_types(x.dtype, y.dtype, [&](auto from, auto to) {
    using X = decltype(from);
    using Y = decltype(to);
    constexpr int N = kNormElements<X, Y>;
    const bool wide = aligned_for<N>({x, y, gain, bias}) && f.columns % N == 0;
    launch_forward<X, Y, false>(ctx, "norm", f, params.groups, wide);
  });
}

void residual_norm(const Context& ctx, const NormParams& params, const Tensor& residual, const Tensor& branch,
                   const Tensor& gain, const Tensor& bias, Tensor sum, Tensor y, Tensor statistics) {
  if (y.numel() == 0) return;
  Forward f = forward_of(params, gain, bias, y, statistics);
  f.x = residual.data;
  f.x_stride = residual.row_stride;
  f.branch = branch.data;
  f.branch_stride = branch.row_stride;
  f.sum = sum.data;
  f.sum_stride = sum.row_stride;
  visit_device_dtype(y.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int N = kNormElements<T, T>;
    const bool wide = aligned_for<N>({residual, branch, sum, y, gain, bias}) && f.columns % N == 0;
    launch_forward<T, T, true>(ctx, "residual_norm", f, params.groups, wide);
  });
}

}  // namespace kernels::cuda

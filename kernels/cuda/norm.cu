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

// Brings rows to the stages: x, or the residual and the branch.
template <class S, typename X, typename Y, bool kResidual>
class ForwardRows {
 public:
  static constexpr int N = kNormElements<X, Y>;
  __device__ __forceinline__ ForwardRows(const Forward& f, int64_t row, int64_t step, int64_t column)
      : x_(static_cast<const X*>(f.x), f.x_stride, row, step, column),
        branch_(static_cast<const Y*>(f.branch), f.branch_stride, row, step, column),
        sum_(static_cast<Y*>(f.sum), f.sum_stride, row, step, column) {}

  // The next row of `vectors` vectors, if it is there.
  __device__ __forceinline__ void copy(RowStages& stages, int vectors, bool there) {
    unsigned char* to = stages.fill();
    x_.copy(to, there ? vectors : 0);
    x_.advance();
    if constexpr (kResidual) {
      branch_.copy(to + vectors * N * sizeof(X), there ? vectors : 0);
      branch_.advance();
    }
    stages.end_copies();
  }

  // The row of a stage as it is normalised, and the sum of what this thread has of it. A residual and a
  // branch become their sum here. `number`: plan.vectors, or 0 without a row.
  __device__ __forceinline__ float take(const unsigned char* stage, int vectors, int number,
                                        float (&x)[S::kVectors][N]) {
    float total = 0;
#pragma unroll
    for (int k = 0; k < S::kVectors; ++k) {
      const int i = k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      if (i >= number) continue;
      auto in = staged_vector<N, X>(stage, i);
      if constexpr (kResidual) {
        const auto branch = staged_vector<N, Y>(stage + vectors * N * sizeof(X), i);
#pragma unroll
        for (int j = 0; j < N; ++j) in.at[j] = from_float<Y>(to_float(in.at[j]) + to_float(branch.at[j]));
        store_global(sum_.vector(k), in);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        x[k][j] = to_float(in.at[j]);
        total += x[k][j];
      }
    }
    if constexpr (kResidual) sum_.advance();
    return total;
  }

 private:
  RowWalk<S, N, const X> x_;
  RowWalk<S, N, const Y> branch_;
  RowWalk<S, N, Y> sum_;
};

// x / n, where `inverse` is 1 / n: exact where the quotient is.
__device__ __forceinline__ float divided(float x, float n, float inverse) {
  const float quotient = x * inverse;
  return fmaf(fmaf(-quotient, n, x), inverse, quotient);
}

constexpr int kThreads = 512;  // of a multiprocessor: 128 registers each

// A group of a row stays in the registers of blockDim.x threads.
template <class S, typename X, typename Y, bool kResidual>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const Forward f, const RowPlan plan) {
  constexpr int N = kNormElements<X, Y>;
  __shared__ __align__(16) float shared[S::kWholeWarps ? kRowSums : 4];
  extern __shared__ __align__(16) unsigned char memory[];
  const int lanes = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x), group = blockIdx.y;
  const int64_t step = int64_t{gridDim.x} * blockDim.y, column = int64_t{group} * f.columns;
  int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, ahead = row;
  let_next_start();
  wait_for_previous();
  RowStages stages(memory, plan);
  ForwardRows<S, X, Y, kResidual> rows(f, row, step, column);
#pragma unroll 1
  for (int k = 1; k < plan.stages; ++k, ahead += step) rows.copy(stages, plan.vectors, ahead < f.rows);
  RowSums<S> sums(shared);
  Vector<Y, N> gain[S::kVectors], bias[S::kVectors];
  load_parameters<S>(f.gain, column, plan.vectors, gain);
  load_parameters<S>(f.bias, column, plan.vectors, bias);
  RowWalk<S, N, Y> y_rows(static_cast<Y*>(f.y), f.y_stride, row, step, column);
  for (int64_t first = int64_t{blockIdx.x} * blockDim.y; first < f.rows; first += step) {
    rows.copy(stages, plan.vectors, ahead < f.rows);
    const bool live = row < f.rows;
    const int vectors = live ? plan.vectors : 0;
    float x[S::kVectors][N], squares = 0;
    const float sum = rows.take(stages.read(), plan.vectors, vectors, x);
    const float mean = f.layer ? divided(sums(sum), static_cast<float>(f.columns), f.inverse) : 0.0f;
#pragma unroll
    for (int k = 0; k < S::kVectors; ++k)
      if (k * lanes + lane < vectors)
#pragma unroll
        for (int j = 0; j < N; ++j) {
          x[k][j] -= mean;
          squares = fmaf(x[k][j], x[k][j], squares);
        }
    const float r = rsqrtf(fmaf(sums(squares), f.inverse, f.eps));
    if (live && lane == 0) save_statistics(f, row, group, mean, r);
#pragma unroll
    for (int k = 0; k < S::kVectors; ++k) {
      if (k * lanes + lane >= vectors) continue;
      Vector<Y, N> y;
#pragma unroll
      for (int j = 0; j < N; ++j)
        y.at[j] = from_float<Y>(fmaf(x[k][j] * r, to_float(gain[k].at[j]), to_float(bias[k].at[j])));
      store_global(y_rows.vector(k), y);
    }
    y_rows.advance();
    row += step, ahead += step;
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
  constexpr int kBytes = N * (sizeof(X) + (kResidual ? sizeof(Y) : 0));
  visit_spread(f.columns, N, wide, [&](auto spread) {
    using S = decltype(spread);
    if constexpr (std::is_same_v<S, AnySpread>) {
      const dim3 grid(static_cast<unsigned>(f.rows), static_cast<unsigned>(groups));
      launch(ctx, name, {.grid = grid, .block = kAnyThreads, .dependent = starts_early(grid.x * grid.y)},
             forward_any_kernel<X, Y, kResidual>, f);
    } else {
      const RowPlan plan = plan_rows<S>(f.rows, groups, f.columns / N, kBytes, kThreads, 32);
      const auto kernel = forward_kernel<S, X, Y, kResidual>;
      allow_shared(kernel, plan, name);
      launch(ctx, name,
             {.grid = plan.grid,
              .block = plan.block,
              .dependent = starts_early(plan.grid.x * plan.grid.y),
              .shared = plan.shared()},
             kernel, f, plan);
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

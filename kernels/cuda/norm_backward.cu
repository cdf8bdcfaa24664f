#include <algorithm>

#include "kernels/cuda/device/norm_rows.cuh"
#include "kernels/cuda/shares.h"
#include "kernels/ops/norm.h"

namespace kernels::cuda {

namespace {

// Rows are dealt to a fixed number of blocks, each of which adds up its share of dgain and dbias; a second
// kernel adds the shares in order. Neither the number of blocks nor the order depends on the device.
constexpr int64_t kSummingThreads = int64_t{264} * 256;

struct Backward {
  const void *dy, *x, *gain;
  const float* statistics;
  void* dx;
  float *dgain, *dbias;  // (blocks, all columns) shares, or null
  int64_t dy_stride, x_stride, statistics_stride, dx_stride;
  int64_t rows;
  int columns, all_columns;  // of a group, of a row
  bool layer, accumulate;
};

template <typename X, typename Y, typename DX>
struct BackwardRow {
  const Y* dy;
  const X* x;
  DX* dx;
  float mean, r;
  __device__ BackwardRow(const Backward& b, int64_t row, int group) {
    const int64_t column = int64_t{group} * b.columns;
    dy = static_cast<const Y*>(b.dy) + row * b.dy_stride + column;
    x = static_cast<const X*>(b.x) + row * b.x_stride + column;
    dx = static_cast<DX*>(b.dx) + row * b.dx_stride + column;
    mean = b.statistics[row * b.statistics_stride + 2 * group];
    r = b.statistics[row * b.statistics_stride + 2 * group + 1];
  }
};

// Adds what the groups of a block have summed, one after the other, and writes the block's share.
template <class S, int N>
__device__ __forceinline__ void write_share(const float (&sums)[S::kVectors][N], float* share, int columns,
                                            float* shared) {
  const int lane = threadIdx.x % S::kLanes, slot = threadIdx.x / S::kLanes;
  for (int turn = 0; turn < S::kRows; ++turn) {
    if (slot == turn)
#pragma unroll
      for (int k = 0; k < S::kVectors; ++k) {
        const int c = (k * S::kLanes + lane) * N;
        if (c >= columns) continue;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const float before = turn == 0 ? 0.0f : shared[c + j];
          if (turn + 1 < S::kRows)
            shared[c + j] = before + sums[k][j];
          else
            share[c + j] = before + sums[k][j];
        }
      }
    if (S::kRows > 1) __syncthreads();
  }
}

// dx = r (h - mean(h) - xhat mean(h xhat)) with h = dy g and xhat = (x - m) r; mean(h) is 0 for rms.
// h is rounded before it is used: contracted with the subtraction of its mean it would not vanish where it
// must.
template <class S, typename X, typename Y, typename DX>
__global__ void __launch_bounds__(S::kThreads, S::kVectors > 3 ? 1 : 512 / S::kThreads)
    backward_kernel(const Backward b) {
  constexpr int N = kNormElements<X, Y>;
  __shared__ float shared[33];
  __shared__ float turns[S::kRows > 1 ? S::kLanes * S::kVectors * N : 1];
  const int lane = threadIdx.x % S::kLanes, slot = threadIdx.x / S::kLanes, group = blockIdx.y;
  const Y* gain = static_cast<const Y*>(b.gain) + int64_t{group} * b.columns;
  float dgain[S::kVectors][N] = {}, dbias[S::kVectors][N] = {};
  for (int64_t first = int64_t{blockIdx.x} * S::kRows; first < b.rows;
       first += int64_t{gridDim.x} * S::kRows) {
    const bool live = first + slot < b.rows;
    const BackwardRow<X, Y, DX> at(b, live ? first + slot : 0, group);
    Vector<Y, N> dy[S::kVectors];
    Vector<X, N> x[S::kVectors];
#pragma unroll
    for (int k = 0; k < S::kVectors; ++k) {
      const int c = (k * S::kLanes + lane) * N;
      if (!live || c >= b.columns) continue;
      dy[k] = load_vector<Y, N>(at.dy + c);
      x[k] = load_vector<X, N>(at.x + c);
    }
    float sum = 0, dot = 0;
#pragma unroll
    for (int k = 0; k < S::kVectors; ++k) {
      const int c = (k * S::kLanes + lane) * N;
      if (!live || c >= b.columns) continue;
      const auto g = load_vector<Y, N>(gain + c);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float d = to_float(dy[k].at[j]), xhat = (to_float(x[k].at[j]) - at.mean) * at.r;
        const float h = __fmul_rn(d, to_float(g.at[j]));
        sum += h;
        dot = fmaf(h, xhat, dot);
        dgain[k][j] = fmaf(d, xhat, dgain[k][j]);
        dbias[k][j] += d;
      }
    }
    const float n = static_cast<float>(b.columns);
    const float slope = lanes_sum<S>(dot, shared) / n;
    const float mean = b.layer ? lanes_sum<S>(sum, shared) / n : 0.0f;
#pragma unroll
    for (int k = 0; k < S::kVectors; ++k) {
      const int c = (k * S::kLanes + lane) * N;
      if (!live || c >= b.columns) continue;
      const auto g = load_vector<Y, N>(gain + c);
      Vector<DX, N> before{}, dx;
      if (b.accumulate) before = load_vector<DX, N>(at.dx + c);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float h = __fmul_rn(to_float(dy[k].at[j]), to_float(g.at[j]));
        const float v = at.r * (h - mean - (to_float(x[k].at[j]) - at.mean) * at.r * slope);
        dx.at[j] = from_float<DX>(b.accumulate ? to_float(before.at[j]) + v : v);
      }
      store_global(at.dx + c, dx);
    }
  }
  const int64_t share = int64_t{blockIdx.x} * b.all_columns + int64_t{group} * b.columns;
  if (b.dgain) write_share<S, N>(dgain, b.dgain + share, b.columns, turns);
  if (b.dbias) write_share<S, N>(dbias, b.dbias + share, b.columns, turns);
}

// Any width and any alignment.
template <typename X, typename Y, typename DX>
__global__ void __launch_bounds__(kAnyThreads) backward_any_kernel(const Backward b) {
  __shared__ float shared[33];
  const int group = blockIdx.y;
  const BackwardRow<X, Y, DX> at(b, blockIdx.x, group);
  const Y* gain = static_cast<const Y*>(b.gain) + int64_t{group} * b.columns;
  float sum = 0, dot = 0;
  for (int c = threadIdx.x; c < b.columns; c += kAnyThreads) {
    const float h = __fmul_rn(to_float(at.dy[c]), to_float(gain[c]));
    sum += h;
    dot = fmaf(h, (to_float(at.x[c]) - at.mean) * at.r, dot);
  }
  const float n = static_cast<float>(b.columns);
  const float slope = block_reduce<Sum>(dot, shared, 0.0f) / n;
  const float mean = b.layer ? block_reduce<Sum>(sum, shared, 0.0f) / n : 0.0f;
  for (int c = threadIdx.x; c < b.columns; c += kAnyThreads) {
    const float h = __fmul_rn(to_float(at.dy[c]), to_float(gain[c]));
    const float v = at.r * (h - mean - (to_float(at.x[c]) - at.mean) * at.r * slope);
    at.dx[c] = from_float<DX>(b.accumulate ? to_float(at.dx[c]) + v : v);
  }
}

// The shares of dgain and dbias alone; a thread adds up one column of a block's rows.
template <typename X, typename Y>
__global__ void __launch_bounds__(kAnyThreads) shares_any_kernel(const Backward b) {
  const int group = blockIdx.y, c = blockIdx.z * kAnyThreads + threadIdx.x;
  if (c >= b.columns) return;
  float dgain = 0, dbias = 0;
  for (int64_t row = blockIdx.x; row < b.rows; row += gridDim.x) {
    const BackwardRow<X, Y, Y> at(b, row, group);
    const float d = to_float(at.dy[c]);
    dgain = fmaf(d, (to_float(at.x[c]) - at.mean) * at.r, dgain);
    dbias += d;
  }
  const int64_t share = int64_t{blockIdx.x} * b.all_columns + int64_t{group} * b.columns + c;
  b.dgain[share] = dgain;
  if (b.dbias) b.dbias[share] = dbias;
}

int64_t share_blocks(int64_t rows, int64_t groups, int threads, int rows_per_block) {
  const int64_t wanted = std::max<int64_t>(1, kSummingThreads / threads / groups);
  return std::min(wanted, (rows + rows_per_block - 1) / rows_per_block);
}

// Shares of dgain and dbias are taken from here at most.
int64_t most_blocks(int64_t rows) { return std::min(rows, kSummingThreads / 128); }

template <typename X, typename Y, typename DX>
int64_t launch_backward(const Context& ctx, const Backward& b, int64_t groups, bool wide) {
  int64_t blocks = 0;
  const auto grid_y = static_cast<unsigned>(groups);
  visit_spread(b.columns, kNormElements<X, Y>, wide, [&](auto spread) {
    using S = decltype(spread);
    if constexpr (std::is_same_v<S, AnySpread>) {
      if (b.dgain) {
        blocks = share_blocks(b.rows, groups, kAnyThreads, 1);
        const dim3 grid(static_cast<unsigned>(blocks), grid_y, (b.columns + kAnyThreads - 1) / kAnyThreads);
        shares_any_kernel<X, Y><<<grid, kAnyThreads, 0, stream_of(ctx)>>>(b);
      }
      const dim3 grid(static_cast<unsigned>(b.rows), grid_y);
      backward_any_kernel<X, Y, DX><<<grid, kAnyThreads, 0, stream_of(ctx)>>>(b);
    } else {
      blocks = share_blocks(b.rows, groups, S::kThreads, S::kRows);
      const dim3 grid(static_cast<unsigned>(blocks), grid_y);
      backward_kernel<S, X, Y, DX><<<grid, S::kThreads, 0, stream_of(ctx)>>>(b);
    }
  });
  check_launch("norm_backward");
  return blocks;
}

// Of the shares that there are.
void add_all(const Context& ctx, const Backward& b, int64_t count, const Tensor& dgain, const Tensor& dbias) {
  Shares all{};
  int number = 0;
  const auto take = [&](const float* shares, const Tensor& gradient) {
    if (!shares) return;
    all.shares[number] = shares;
    all.sums[number++] = gradient.as<float>();
  };
  take(b.dgain, dgain);
  take(b.dbias, dbias);
  add_shares(ctx, "norm_backward", all, number, count, b.all_columns);
}

}  // namespace

void norm_backward(const Context& ctx, const NormParams& params, const Tensor& dy, const Tensor& x,
                   const Tensor& gain, const Tensor& statistics, Tensor dx, bool accumulate, Tensor dgain,
                   Tensor dbias) {
  const ArenaScope scope(*ctx.scratch);
  Backward b{};
  const auto shares = [&](const Tensor& gradient) -> float* {
    if (!gradient) return nullptr;
    return ctx.scratch->allocate("norm shares", DType::f32, {most_blocks(x.rows()), x.cols()}).as<float>();
  };
  b.dgain = shares(dgain);
  b.dbias = shares(dbias);
  if (ctx.rehearsal || x.numel() == 0) return;
  b.dy = dy.data, b.dy_stride = dy.row_stride;
  b.x = x.data, b.x_stride = x.row_stride;
  b.dx = dx.data, b.dx_stride = dx.row_stride;
  b.gain = gain.data;
  b.statistics = statistics.as<float>(), b.statistics_stride = statistics.row_stride;
  b.rows = x.rows();
  b.all_columns = static_cast<int>(x.cols());
  b.columns = static_cast<int>(x.cols() / params.groups);
  b.layer = params.kind == NormKind::layer;
  b.accumulate = accumulate;
  visit_norm_types(x.dtype, dy.dtype, [&](auto from, auto to) {
    using X = decltype(from);
    using Y = decltype(to);
    constexpr int N = kNormElements<X, Y>;
    const bool wide = aligned_for<N>({dy, x, dx, gain}) && b.columns % N == 0;
    int64_t count = 0;
    if (dx.dtype == x.dtype) {
      count = launch_backward<X, Y, X>(ctx, b, params.groups, wide);
    } else if constexpr (!std::is_same_v<X, Y>) {
      count = launch_backward<X, Y, Y>(ctx, b, params.groups, wide);
    }
    add_all(ctx, b, count, dgain, dbias);
  });
}

}  // namespace kernels::cuda

#include <algorithm>

#include "kernels/cuda/device/norm_rows.cuh"
#include "kernels/cuda/shares.h"
#include "kernels/ops/norm.h"

namespace kernels::cuda {

namespace {

// Rows are dealt to a fixed number of blocks, each of which adds up its share of dgain and dbias; a second
// kernel adds the shares in order. Neither the number of blocks nor the order depends on the device.
constexpr int kThreads = 384;  // of a multiprocessor: 168 registers each
constexpr int64_t kMostShares = kRowMultiprocessors * 3, kAnyShares = kRowMultiprocessors * 2;

struct Backward {
  const void *dy, *x, *gain;
  const float* statistics;
  void* dx;
  float *dgain, *dbias;  // (blocks, all columns) shares, or null
  int64_t dy_stride, x_stride, statistics_stride, dx_stride;
  int64_t rows;
  int columns, all_columns;  // of a group, of a row
  float inverse;             // 1 / columns
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

// Brings rows to the stages: x, then dx as it was where it is added to, then dy, and the statistics behind
// them.
template <class S, typename X, typename Y, typename DX>
class BackwardRows {
 public:
  static constexpr int N = kNormElements<X, Y>;
  static constexpr int kBytes = N * (sizeof(X) + sizeof(DX) + sizeof(Y));
  __device__ __forceinline__ BackwardRows(const Backward& b, int64_t row, int64_t step, int64_t column)
      : x_(static_cast<const X*>(b.x), b.x_stride, row, step, column),
        before_(static_cast<const DX*>(b.dx), b.dx_stride, row, step, column),
        dy_(static_cast<const Y*>(b.dy), b.dy_stride, row, step, column) {}
  static __device__ __forceinline__ int before(int vectors) { return vectors * N * sizeof(X); }
  static __device__ __forceinline__ int dy(int vectors) { return vectors * N * (sizeof(X) + sizeof(DX)); }

  // The next row of `vectors` vectors, if it is there.
  __device__ __forceinline__ void copy(RowStages& stages, int vectors, bool there, bool accumulate) {
    unsigned char* to = stages.fill();
    const int number = there ? vectors : 0;
    x_.copy(to, number);
    dy_.copy(to + dy(vectors), number);
    before_.copy(to + before(vectors), accumulate ? number : 0);
    stages.end_copies();
    x_.advance();
    before_.advance();
    dy_.advance();
  }

 private:
  RowWalk<S, N, const X> x_;
  RowWalk<S, N, const DX> before_;
  RowWalk<S, N, const Y> dy_;
};

// Of one row: h, xhat and their sums; what this row adds to dgain and dbias.
template <class S, int N>
struct BackwardSums {
  float h[S::kVectors][N], xhat[S::kVectors][N];
  float dgain[S::kVectors][N] = {}, dbias[S::kVectors][N] = {};

  // h is rounded before it is used: contracted with the subtraction of its mean it would not vanish where it
  // must.
  template <typename X, typename Y>
  __device__ __forceinline__ float2 add(int k, const Vector<X, N>& x, const Vector<Y, N>& dy,
                                        const Vector<Y, N>& gain, float2 statistics) {
    float sum = 0, dot = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float d = to_float(dy.at[j]);
      xhat[k][j] = (to_float(x.at[j]) - statistics.x) * statistics.y;
      h[k][j] = __fmul_rn(d, to_float(gain.at[j]));
      sum += h[k][j];
      dot = fmaf(h[k][j], xhat[k][j], dot);
      dgain[k][j] = fmaf(d, xhat[k][j], dgain[k][j]);
      dbias[k][j] += d;
    }
    return {sum, dot};
  }
  // dx, added to `before`; means: the row's means of h (0 for rms) and of h xhat.
  template <typename DX>
  __device__ __forceinline__ Vector<DX, N> dx(int k, const Vector<DX, N>& before, float2 means,
                                              float r) const {
    Vector<DX, N> dx;
#pragma unroll
    for (int j = 0; j < N; ++j)
      dx.at[j] = from_float<DX>(fmaf(r, h[k][j] - means.x - xhat[k][j] * means.y, to_float(before.at[j])));
    return dx;
  }
};

// The block's share: what its rows at a time have summed, one after the other.
template <class S, int N>
__device__ __forceinline__ void write_share(const float (&sums)[S::kVectors][N], float* share, int columns,
                                            float* shared) {
  __syncthreads();
#pragma unroll
  for (int k = 0; k < S::kVectors; ++k) {
    const int c = (k * blockDim.x + threadIdx.x) * N;
    if (c >= columns) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) shared[threadIdx.y * columns + c + j] = sums[k][j];
  }
  __syncthreads();
  for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < columns; c += blockDim.x * blockDim.y) {
    float sum = 0;
    for (int row = 0; row < blockDim.y; ++row) sum += shared[row * columns + c];
    share[c] = sum;
  }
}

template <class S, int N>
__device__ __forceinline__ void write_shares(const Backward& b, const BackwardSums<S, N>& mine,
                                             int64_t column, unsigned char* stages) {
  asm volatile("cp.async.wait_all;" ::: "memory");
  const int64_t share = int64_t{blockIdx.x} * b.all_columns + column;
  auto* shared = reinterpret_cast<float*>(stages);
  if (b.dgain) write_share<S, N>(mine.dgain, b.dgain + share, b.columns, shared);
  if (b.dbias) write_share<S, N>(mine.dbias, b.dbias + share, b.columns, shared);
}

__device__ __forceinline__ float2 statistics_of(const Backward& b, int64_t row) {
  if (row >= b.rows) return {};
  const float* at = b.statistics + row * b.statistics_stride + 2 * blockIdx.y;
  return {at[0], at[1]};
}

// dx = r (h - mean(h) - xhat mean(h xhat)) with h = dy g and xhat = (x - m) r; mean(h) is 0 for rms.
template <class S, typename X, typename Y, typename DX>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Backward b, const RowPlan plan) {
  constexpr int N = kNormElements<X, Y>;
  using Rows = BackwardRows<S, X, Y, DX>;
  __shared__ __align__(16) float shared[S::kWholeWarps ? kRowSums : 4];
  extern __shared__ __align__(16) unsigned char memory[];
  const int lanes = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x);
  const int64_t step = int64_t{gridDim.x} * blockDim.y, column = int64_t{blockIdx.y} * b.columns;
  int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, ahead = row;
  RowStages stages(memory, plan);
  Rows rows(b, row, step, column);
#pragma unroll 1
  for (int k = 1; k < plan.stages; ++k, ahead += step)
    rows.copy(stages, plan.vectors, ahead < b.rows, b.accumulate);
  float2 next_statistics = statistics_of(b, row);
  RowSums<S> sums(shared);
  Vector<Y, N> gain[S::kVectors];
  load_parameters<S>(b.gain, column, plan.vectors, gain);
  RowWalk<S, N, DX> dx_rows(static_cast<DX*>(b.dx), b.dx_stride, row, step, column);
  BackwardSums<S, N> mine;
  for (int64_t first = int64_t{blockIdx.x} * blockDim.y; first < b.rows; first += step) {
    rows.copy(stages, plan.vectors, ahead < b.rows, b.accumulate);
    const int vectors = row < b.rows ? plan.vectors : 0;
    row += step, ahead += step;
    const float2 statistics = next_statistics;
    next_statistics = statistics_of(b, row);
    const unsigned char* stage = stages.read();
    float2 all{};
#pragma unroll
    for (int k = 0; k < S::kVectors; ++k) {
      const int i = k * lanes + lane;
      if (i >= vectors) continue;
      const auto x = staged_vector<N, X>(stage, i);
      const auto dy = staged_vector<N, Y>(stage + Rows::dy(plan.vectors), i);
      const float2 part = mine.add(k, x, dy, gain[k], statistics);
      all.x += part.x, all.y += part.y;
    }
    all = sums(all.x, all.y);
    const float2 means{b.layer ? all.x * b.inverse : 0.0f, all.y * b.inverse};
#pragma unroll
    for (int k = 0; k < S::kVectors; ++k) {
      const int i = k * lanes + lane;
      if (i >= vectors) continue;
      Vector<DX, N> before{};
      if (b.accumulate) before = staged_vector<N, DX>(stage + Rows::before(plan.vectors), i);
      store_global(dx_rows.vector(k), mine.dx(k, before, means, statistics.y));
    }
    dx_rows.advance();
  }
  write_shares<S, N>(b, mine, column, memory);
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

// Shares of dgain and dbias are taken from here at most.
int64_t most_blocks(int64_t rows) { return std::min(rows, kMostShares); }

template <typename X, typename Y, typename DX>
int64_t launch_backward(const Context& ctx, const Backward& b, int64_t groups, bool wide) {
  constexpr int N = kNormElements<X, Y>;
  int64_t blocks = 0;
  const auto grid_y = static_cast<unsigned>(groups);
  visit_spread(b.columns, N, wide, [&](auto spread) {
    using S = decltype(spread);
    if constexpr (std::is_same_v<S, AnySpread>) {
      if (b.dgain) {
        blocks = std::min(std::max<int64_t>(1, kAnyShares / groups), b.rows);
        const dim3 grid(static_cast<unsigned>(blocks), grid_y, (b.columns + kAnyThreads - 1) / kAnyThreads);
        shares_any_kernel<X, Y><<<grid, kAnyThreads, 0, stream_of(ctx)>>>(b);
      }
      const dim3 grid(static_cast<unsigned>(b.rows), grid_y);
      backward_any_kernel<X, Y, DX><<<grid, kAnyThreads, 0, stream_of(ctx)>>>(b);
    } else {
      constexpr int kBytes = BackwardRows<S, X, Y, DX>::kBytes;
      const RowPlan plan = plan_rows<S>(b.rows, groups, b.columns / N, kBytes, kThreads);
      const auto kernel = backward_kernel<S, X, Y, DX>;
      allow_shared(kernel, plan, "norm_backward");
      kernel<<<plan.grid, plan.block, plan.shared(), stream_of(ctx)>>>(b, plan);
      blocks = plan.grid.x;
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
  b.inverse = 1.0f / static_cast<float>(b.columns);
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

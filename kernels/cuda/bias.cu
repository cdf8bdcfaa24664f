#include <algorithm>

#include "kernels/cuda/bias.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/shares.h"

namespace kernels::cuda {

namespace {

template <typename T, typename Y>
__global__ void copy_kernel(const T* bias, Y* y, int64_t stride, int64_t rows, int columns) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  const Y value = from_float<Y>(to_float(bias[column]));
  for (int64_t i = blockIdx.y; i < rows; i += gridDim.y) y[i * stride + column] = value;
}

// As many as run at once; on every device the same, as they decide on the order of sums.
constexpr int64_t kBlocks = 528;
constexpr int kWarps = 8, kRowsAtOnce = 8;

// Adds rows i, i + step and so on, kRowsAtOnce of them or, unless kWhole, those before `rows`. All are
// fetched before the first is added, without a branch between them.
template <bool kWhole, typename T, int N>
__device__ __forceinline__ void add_rows(const T* dy, int64_t stride, int64_t i, int64_t step, int64_t rows,
                                         float (&sum)[N]) {
  Vector<T, N> row[kRowsAtOnce];
#pragma unroll
  for (int k = 0; k < kRowsAtOnce; ++k) {
    const int64_t from = i + k * step;
    row[k] = load_vector<T, N>(dy + (kWhole ? from : min(from, rows - 1)) * stride);
  }
#pragma unroll
  for (int k = 0; k < kRowsAtOnce; ++k)
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float value = to_float(row[k].at[j]);
      sum[j] += kWhole || i + k * step < rows ? value : 0.0f;
    }
}

// A block sums 32 N columns over every gridDim.y * kWarps-th row: its warps take rows in turn, then their
// sums are added. out[0 .. columns) of the block's own row of shares is written, or, with one block for all
// rows, added to.
template <typename T, int N>
__global__ void __launch_bounds__(kWarps * 32, 4)
    sums_kernel(const T* dy, int64_t stride, int64_t rows, int columns, float* out) {
  constexpr int kColumns = 32 * N;
  __shared__ float partial[kWarps][kColumns];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = blockIdx.x * kColumns, column = first + lane * N;
  float sum[N] = {};
  if (column < columns) {
    const int64_t step = int64_t{gridDim.y} * kWarps;
    int64_t i = int64_t{blockIdx.y} * kWarps + warp;
    for (; i + (kRowsAtOnce - 1) * step < rows; i += kRowsAtOnce * step)
      add_rows<true, T, N>(dy + column, stride, i, step, rows, sum);
    if (i < rows) add_rows<false, T, N>(dy + column, stride, i, step, rows, sum);
  }
#pragma unroll
  for (int j = 0; j < N; ++j) partial[warp][lane * N + j] = sum[j];
  __syncthreads();
  const int mine = threadIdx.x;
  if (mine >= kColumns || first + mine >= columns) return;
  float total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += partial[w][mine];
  float* to = out + int64_t{blockIdx.y} * columns + first + mine;
  *to = gridDim.y == 1 ? *to + total : total;
}

template <typename T, int N>
void sum_columns(const Context& ctx, const Tensor& dy, Tensor sums) {
  constexpr int kRowsOfABlock = kWarps * kRowsAtOnce;  // fewer do not pay a block
  const auto groups = static_cast<int64_t>((dy.cols() + 32 * N - 1) / (32 * N));
  const int64_t wanted = kBlocks / groups;
  const int64_t blocks = std::max<int64_t>(
      1, std::min({wanted, (dy.rows() + kRowsOfABlock - 1) / kRowsOfABlock, kColumnSums / dy.cols()}));
  float* shares = column_sums_memory(ctx);
  const auto columns = static_cast<int>(dy.cols());
  const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(blocks));
  sums_kernel<T, N><<<grid, kWarps * 32, 0, stream_of(ctx)>>>(static_cast<const T*>(dy.data), dy.row_stride,
                                                              dy.rows(), columns,
                                                              blocks == 1 ? sums.as<float>() : shares);
  check_launch("linear_backward_weight");
  if (blocks > 1)
    add_shares(ctx, "linear_backward_weight", {.shares = {shares}, .sums = {sums.as<float>()}}, 1, blocks,
               columns);
}

}  // namespace

void copy_to_rows(const Context& ctx, const Tensor& bias, Tensor y) {
  visit_device_dtype(bias.dtype, [&](auto in) {
    visit_device_dtype(y.dtype, [&](auto out) {
      using T = decltype(in);
      using Y = decltype(out);
      const int columns = static_cast<int>(y.cols());
      const dim3 grid((columns + 255) / 256, static_cast<unsigned>(std::min<int64_t>(y.rows(), 1024)));
      copy_kernel<<<grid, 256, 0, stream_of(ctx)>>>(static_cast<const T*>(bias.data), static_cast<Y*>(y.data),
                                                    y.row_stride, y.rows(), columns);
    });
  });
  check_launch("linear");
}

void add_column_sums(const Context& ctx, const Tensor& dy, Tensor sums) {
  visit_device_dtype(dy.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int kWide = kVectorElements<T>;
    if (rows_aligned(dy, 16) && dy.cols() % kWide == 0)
      sum_columns<T, kWide>(ctx, dy, sums);
    else
      sum_columns<T, 1>(ctx, dy, sums);
  });
}

}  // namespace kernels::cuda

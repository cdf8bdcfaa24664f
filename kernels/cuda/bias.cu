#include <algorithm>

#include "kernels/cuda/bias.h"
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/launch.h"

namespace kernels::cuda {

namespace {

template <typename T, typename Y>
__global__ void copy_kernel(const T* bias, Y* y, int64_t stride, int64_t rows, int columns) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  const Y value = from_float<Y>(to_float(bias[column]));
  for (int64_t i = blockIdx.y; i < rows; i += gridDim.y) y[i * stride + column] = value;
}

constexpr int kWarps = 16, kCluster = 8;

// A cluster sums kLaneColumns * 32 columns: its warps take rows in turn, then the warps of a block are added
// up, then the blocks. A thread loads kAhead rows before it uses the first: few columns make few blocks, each
// of which must keep more on its way.
template <typename T, int kLaneColumns, int kAhead>
__global__ void __launch_bounds__(kWarps * 32)
    sums_kernel(const T* dy, int64_t stride, int64_t rows, int columns, float* sums) {
  constexpr int kColumns = 32 * kLaneColumns;
  __shared__ float partial[kWarps][kColumns], total[kColumns];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t blocks = cluster_size(), rank = cluster_rank();
  const int first = blockIdx.x / blocks * kColumns;
  const int column = first + lane * kLaneColumns;
  float sum[kLaneColumns] = {};
  if (column < columns) {
#pragma unroll kAhead
    for (int64_t i = rank * kWarps + warp; i < rows; i += blocks * kWarps) {
      const auto row = load_vector<T, kLaneColumns>(dy + i * stride + column);
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) sum[j] += to_float(row.at[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kLaneColumns; ++j) partial[warp][lane * kLaneColumns + j] = sum[j];
  __syncthreads();
  const int mine = threadIdx.x;
  if (mine < kColumns) {
    float of_block = 0;
    for (int w = 0; w < kWarps; ++w) of_block += partial[w][mine];
    total[mine] = of_block;
  }
  cluster_sync();
  if (rank == 0 && mine < kColumns && first + mine < columns) {
    float of_cluster = 0;
    for (uint32_t r = 0; r < blocks; ++r) of_cluster += cluster_shared(total, r)[mine];
    sums[first + mine] += of_cluster;
  }
  cluster_sync();  // no block leaves while its sums are read
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
    const auto* data = static_cast<const T*>(dy.data);
    const bool vectors = dy.row_stride % 4 == 0 && dy.cols() % 4 == 0 &&
                         reinterpret_cast<uintptr_t>(data) % (4 * sizeof(T)) == 0;
    const unsigned cluster = has_clusters() ? kCluster : 1;
    const auto run = [&](auto kernel, unsigned columns) {
      const unsigned groups = (static_cast<unsigned>(dy.cols()) + columns - 1) / columns;
      launch(ctx, "linear_backward_weight",
             {.grid = dim3(groups * cluster), .block = dim3(kWarps * 32), .cluster = cluster}, kernel, data,
             dy.row_stride, dy.rows(), static_cast<int>(dy.cols()), sums.as<float>());
    };
    if (!vectors) return run(sums_kernel<T, 1, 8>, 32);
    dy.cols() <= 1024 ? run(sums_kernel<T, 2, 16>, 64) : run(sums_kernel<T, 4, 8>, 128);
  });
}

}  // namespace kernels::cuda

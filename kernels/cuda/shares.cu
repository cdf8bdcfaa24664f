#include "kernels/cuda/check.h"
#include "kernels/cuda/shares.h"

namespace kernels::cuda {

namespace {

constexpr int kColumns = 32, kRows = 32, kAtOnce = 4;

// 32 threads take every 32nd share of a column, then their sums are added. Shares are fetched kAtOnce at a
// time, without a branch between them.
__global__ void __launch_bounds__(kColumns* kRows)
    add_shares_kernel(const Shares all, int count, int columns) {
  const bool second = blockIdx.y == 1;
  const float* shares = second ? all.shares[1] : all.shares[0];
  __shared__ float sums[kRows][kColumns];
  const int column = blockIdx.x * kColumns + threadIdx.x;
  float sum = 0;
  if (column < columns)
    for (int first = threadIdx.y; first < count; first += kAtOnce * kRows) {
      float share[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        share[k] = shares[int64_t{min(first + k * kRows, count - 1)} * columns + column];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) sum += first + k * kRows < count ? share[k] : 0.0f;
    }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
  float total = 0;
#pragma unroll
  for (int s = 0; s < kRows; ++s) total += sums[s][threadIdx.x];
  (second ? all.sums[1] : all.sums[0])[column] += total;
}

}  // namespace

void add_shares(const Context& ctx, const char* operation, const Shares& all, int number, int64_t count,
                int columns) {
  if (number == 0) return;
  const dim3 grid((columns + kColumns - 1) / kColumns, number), block(kColumns, kRows);
  add_shares_kernel<<<grid, block, 0, stream_of(ctx)>>>(all, static_cast<int>(count), columns);
  check_launch(operation);
}

}  // namespace kernels::cuda

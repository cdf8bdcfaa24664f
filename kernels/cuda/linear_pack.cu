// What the row-invariant linear layer of decoding (kernels/cuda/linear_rows.cu) reads, written once before
// decoding: weights in the order of the matrix units, and the sums of a norm ahead.
#include "kernels/cuda/check.h"
#include "kernels/cuda/device/rows_product.cuh"

namespace kernels::cuda {

namespace {

// Where element e of a panel's tile stands in the matrix: what WarpProduct<T> reads.
template <typename T>
__device__ __forceinline__ int2 place_in_tile(int e) {
  if constexpr (sizeof(T) == 2) {
    const int half = e / 256, lane = e / 8 % 32, i = e % 8;
    return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 8 + half * 4 + i / 4 * 2 + i % 2};
  } else {
    const int v = e / 128, lane = e / 4 % 32, i = e % 4;
    return {lane / 2, v * 8 + lane % 2 * 4 + i};
  }
}

// The kernel behind this one may read what was written, by bulk copies too, before it waits.
__device__ __forceinline__ void publish() {
  __threadfence();
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

template <typename T>
__global__ void pack_kernel(const T* matrix, int64_t stride, int out, int in, int tiles, T* panels) {
  const int64_t tile = blockIdx.x;
  const int2 place = place_in_tile<T>(static_cast<int>(threadIdx.x));
  const int64_t row = tile / tiles * kTileRows + place.x, column = tile % tiles * kTileColumns + place.y;
  panels[tile * kTile + threadIdx.x] = row < out && column < in ? matrix[row * stride + column] : T(0.0f);
  publish();
}

// A warp has a row of the matrix.
template <typename T>
__global__ void pack_norm_kernel(const T* matrix, int64_t stride, int rows, int in, const T* gain,
                                 const T* bias, const T* own_bias, float2* sums) {
  const int row = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32), lane = threadIdx.x % 32;
  if (row >= rows) return;
  float2 sum{};
  for (int i = lane; i < in; i += 32) {
    const float weight = to_float(matrix[row * stride + i]);
    sum.x = fmaf(weight, to_float(gain[i]), sum.x);
    if (bias) sum.y = fmaf(weight, to_float(bias[i]), sum.y);
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, other);
    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, other);
  }
  if (own_bias) sum.y += to_float(own_bias[row]);
  if (lane == 0) sums[row] = sum;
  publish();
}

}  // namespace

void pack_panels(const Context& ctx, const Tensor& matrix, Tensor& panels) {
  visit_device_dtype(matrix.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto tiles = static_cast<int>(panels.dim(1));
    pack_kernel<<<static_cast<unsigned>(panels.dim(0) * tiles), kTile, 0, stream_of(ctx)>>>(
        static_cast<const T*>(matrix.data), matrix.row_stride, static_cast<int>(matrix.rows()),
        static_cast<int>(matrix.cols()), tiles, static_cast<T*>(panels.data));
  });
  check_launch("pack_panels");
}

void pack_norm(const Context& ctx, const LinearWeight& w, Tensor& sums) {
  const auto rows = static_cast<int>(w.matrix.rows());
  visit_device_dtype(w.matrix.dtype, [&](auto tag) {
    using T = decltype(tag);
    pack_norm_kernel<<<static_cast<unsigned>((rows + kWarps - 1) / kWarps), kThreads, 0, stream_of(ctx)>>>(
        static_cast<const T*>(w.matrix.data), w.matrix.row_stride, rows, static_cast<int>(w.matrix.cols()),
        static_cast<const T*>(w.norm.gain.data), static_cast<const T*>(w.norm.bias.data),
        static_cast<const T*>(w.bias.data), static_cast<float2*>(sums.data));
  });
  check_launch("pack_norm");
}

}  // namespace kernels::cuda

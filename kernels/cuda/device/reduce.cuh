#pragma once
// Sums and maxima over a warp or a block, in a fixed order: the same threads give the same bits every time.
namespace kernels::cuda {

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Every lane gets the result.
template <typename Op, typename T>
__device__ __forceinline__ T warp_reduce(T x, Op op = {}) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Every thread gets the result; blockDim.x is a multiple of 32. `shared` holds 33 elements and may be used
// again by the next call.
template <typename Op, typename T>
__device__ __forceinline__ T block_reduce(T x, T* shared, T identity, Op op = {}) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  x = warp_reduce<Op>(x, op);
  if (warps == 1) return x;
  __syncthreads();
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  if (warp == 0) {
    x = warp_reduce<Op>(lane < warps ? shared[lane] : identity, op);
    if (lane == 0) shared[32] = x;
  }
  __syncthreads();
  return shared[32];
}

}  // namespace kernels::cuda

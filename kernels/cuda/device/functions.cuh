#pragma once
// Exponentials on the device, from its exp2 and reciprocal units: relative errors of a few 2^-23 near 0; that
// of exp_fast, whose argument is rounded once more, grows by |x| / 2 of them.
namespace kernels::cuda {

inline constexpr float kLog2E = 1.44269504088896341f;

// 2^x; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * kLog2E); }
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp_fast(-x)); }

}  // namespace kernels::cuda

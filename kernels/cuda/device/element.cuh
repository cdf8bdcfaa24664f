#pragma once
// Element types on the device, 16-byte vectors of them, and the visitor that picks one at run time.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "kernels/core/dtype.h"
#include "kernels/core/error.h"

namespace kernels::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(double x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

// N elements moved at once; alignment is the caller's promise.
template <typename T>
inline constexpr int kVectorElements = 16 / sizeof(T);
template <typename T, int N = kVectorElements<T>>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

template <typename T, int N = kVectorElements<T>>
__device__ __forceinline__ Vector<T, N> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}
template <typename T, int N>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, N>& v) {
  *reinterpret_cast<Vector<T, N>*>(p) = v;
}

// The same to global memory, and at once: stores of members may be merged with those of another branch, after
// which the rest is no longer wide.
template <typename T, int N>
__device__ __forceinline__ void store_global(T* p, const Vector<T, N>& v) {
  if constexpr (sizeof(v) == 16) {
    uint32_t word[4];
    memcpy(word, &v, sizeof(v));
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(word[0]), "r"(word[1]),
                 "r"(word[2]), "r"(word[3])
                 : "memory");
  } else if constexpr (sizeof(v) == 8) {
    uint32_t word[2];
    memcpy(word, &v, sizeof(v));
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(word[0]), "r"(word[1]) : "memory");
  } else {
    store_vector(p, v);
  }
}

// Calls fn with a value of the device type behind fp16, bf16 or fp32. fp64 exists on the CPU alone.
template <typename Fn>
decltype(auto) visit_device_dtype(DType t, Fn&& fn) {
  switch (t) {
    case DType::f16:
      return fn(__half{});
    case DType::bf16:
      return fn(__nv_bfloat16{});
    case DType::f32:
      return fn(float{});
    default:
      throw ShapeError("on a GPU a tensor of fp16, bf16 or fp32 is required");
  }
}

}  // namespace kernels::cuda

#pragma once
// Matrix units of sm_80 and later: 16-bit operands, fp32 sums; tiles that lie in shared memory, rows of
// 16-byte units whose places are permuted so that eight rows of one unit lie in eight different banks.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/device/functions.cuh"

namespace kernels::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Byte offset of a 16-byte unit of a tile with kUnits units (a multiple of 8) per row.
template <int kUnits>
__device__ __forceinline__ uint32_t unit_offset(int row, int unit) {
  return static_cast<uint32_t>(row * kUnits * 16 + ((unit ^ (row & 7)) << 4));
}

// Copies 16 bytes to shared memory, or zeroes them. Waits and barriers are the caller's.
__device__ __forceinline__ void copy_unit(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last kGroups groups of this thread's copies have arrived.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Brings the line of 128 bytes that holds `from` to level 2.
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8 and receives, of each, row l /
// 4, columns 2 (l % 4) and the next one. Transposed: column l / 4, rows 2 (l % 4) and the next one.
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t address, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Addresses for them in a tile that begins at a multiple of 256 bytes: those of this lane in the tile's
// corner, then of the 16 rows from `row` on and the 16 columns from 16 `column` on, one XOR away. left: the
// left operand, and transposed the right operand of a product over rows. right: the right operand by rows,
// and transposed the left operand of a product over rows.
template <int kUnits>
__device__ __forceinline__ uint32_t left_corner(const void* tile) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return shared_address(tile) + unit_offset<kUnits>(lane % 16, lane / 16);
}
template <int kUnits>
__device__ __forceinline__ uint32_t right_corner(const void* tile) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return shared_address(tile) + unit_offset<kUnits>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}
template <int kUnits>
__device__ __forceinline__ uint32_t place(uint32_t corner, int row, int column) {
  return (corner ^ static_cast<uint32_t>(column << 5)) + row * kUnits * 16;
}

// c (16 x 8) += a (16 x 16) b (16 x 8).
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two neighbouring elements, the first one in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float a, float b) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 x = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&x);
  } else {
    const __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&x);
  }
}
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t x) {
  if constexpr (std::is_same_v<T, __half>)
    return __half22float2(*reinterpret_cast<const __half2*>(&x));
  else
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&x));
}

// elu + 1 of two elements. Where max(x, 0) is not zero the exponential is 1, so that the sum is rounded once,
// as it would be from fp32; not a number stays so.
template <class T>
__device__ __forceinline__ uint32_t elu_plus_one(uint32_t x) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const Pair v = *reinterpret_cast<const Pair*>(&x);
  const uint32_t zero = 0;
  const Pair zeros = *reinterpret_cast<const Pair*>(&zero);
  const Pair low = __hmin2_nan(v, zeros), high = __hmax2(v, zeros);
  const float2 e = unpack<T>(*reinterpret_cast<const uint32_t*>(&low));
  const uint32_t rounded = pack<T>(exp_fast(e.x), exp_fast(e.y));
  const Pair sum = __hadd2(*reinterpret_cast<const Pair*>(&rounded), high);
  return *reinterpret_cast<const uint32_t*>(&sum);
}

// 2^n for n in [-126, 127], and the exponent of a normal number (0: -127; infinite: 128).
__device__ __forceinline__ float power_of_two(int n) {
  return __int_as_float((min(max(n, -126), 127) + 127) << 23);
}
__device__ __forceinline__ int exponent(float x) { return ((__float_as_int(x) >> 23) & 255) - 127; }

}  // namespace kernels::cuda

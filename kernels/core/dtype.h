#pragma once
// Element types. f16 is IEEE binary16 (largest 65504, smallest normal 2^-14), bf16 the upper half of
// binary32. Both convert to and from float with round-to-nearest-even; arithmetic always happens in acc_t<T>.
#include <immintrin.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>
#include <utility>

#include "kernels/core/error.h"

namespace kernels {

struct f16 {
  uint16_t bits = 0;
  f16() = default;
  explicit f16(float value) : bits(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)) {}
  explicit f16(double value) : f16(static_cast<float>(value)) {}
  operator float() const { return _cvtsh_ss(bits); }
};

struct bf16 {
  uint16_t bits = 0;
  bf16() = default;
  explicit bf16(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<uint16_t>(nan ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  explicit bf16(double value) : bf16(static_cast<float>(value)) {}
  operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

// f64 exists for oracles and gradient checks; training computes in f16, bf16 or f32.
enum class DType : uint8_t { f16, bf16, f32, f64, i32, i64, u8 };

constexpr size_t size_of(DType t) {
  constexpr size_t kSizes[] = {2, 2, 4, 8, 4, 8, 1};
  return kSizes[static_cast<int>(t)];
}
constexpr std::string_view name_of(DType t) {
  constexpr std::string_view kNames[] = {"fp16", "bf16", "fp32", "fp64", "int32", "int64", "uint8"};
  return kNames[static_cast<int>(t)];
}

template <typename T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, f16>) return DType::f16;
  if constexpr (std::is_same_v<T, bf16>) return DType::bf16;
  if constexpr (std::is_same_v<T, float>) return DType::f32;
  if constexpr (std::is_same_v<T, double>) return DType::f64;
  if constexpr (std::is_same_v<T, int32_t>) return DType::i32;
  if constexpr (std::is_same_v<T, int64_t>) return DType::i64;
  if constexpr (std::is_same_v<T, uint8_t>) return DType::u8;
}

// The type sums and statistics are held in: double for double, float for everything else.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The type of master weights, main gradients and moments that belong to a compute type.
constexpr DType main_dtype(DType compute) { return compute == DType::f64 ? DType::f64 : DType::f32; }

// Calls fn with a value of the C++ type behind a floating-point dtype: visit_dtype(t, [&](auto tag) { using T
// = decltype(tag); }).
template <typename Fn>
decltype(auto) visit_dtype(DType t, Fn&& fn) {
  switch (t) {
    case DType::f16:
      return std::forward<Fn>(fn)(f16{});
    case DType::bf16:
      return std::forward<Fn>(fn)(bf16{});
    case DType::f32:
      return std::forward<Fn>(fn)(float{});
    case DType::f64:
      return std::forward<Fn>(fn)(double{});
    default:
      throw ShapeError("a floating-point tensor is required");
  }
}

}  // namespace kernels

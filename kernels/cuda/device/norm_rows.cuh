#pragma once
// How the norm kernels spread a group of a row over threads, and the sums over those threads.
#include <initializer_list>

#include "kernels/core/tensor.h"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/device/map.cuh"
#include "kernels/cuda/device/reduce.cuh"

namespace kernels::cuda {

// kLanes_ threads hold up to kVectors_ vectors each.
template <int kLanes_, int kVectors_>
struct Spread {
  static constexpr int kLanes = kLanes_, kVectors = kVectors_;
  static constexpr int kThreads = kLanes > 32 ? kLanes : 256;  // of a block
  static constexpr int kRows = kThreads / kLanes;              // groups of a block at a time
};
// A whole block goes over the row element by element, as often as it must.
struct AnySpread {};
inline constexpr int kAnyThreads = 256;

// Elements of a vector: 16 bytes of the wider type.
template <typename X, typename Y>
inline constexpr int kNormElements = 16 / static_cast<int>(std::max(sizeof(X), sizeof(Y)));

// Calls fn with the spread for `columns` elements in vectors of `elements`.
template <typename Fn>
void visit_spread(int columns, int elements, bool wide, Fn&& fn) {
  const int vectors = columns / elements;
  if (!wide || vectors > 256 * 4) return fn(AnySpread{});
  if (vectors <= 8 * 2) return fn(Spread<8, 2>{});
  if (vectors <= 32 * 3) return fn(Spread<32, 3>{});
  if (vectors <= 128 * 2) return fn(Spread<128, 2>{});
  return fn(Spread<256, 4>{});
}

// The sum over the lanes of a group, for every lane; all threads of the block take part.
template <class S>
__device__ __forceinline__ float lanes_sum(float x, float* shared) {
  if constexpr (S::kLanes > 32) {
    return block_reduce<Sum>(x, shared, 0.0f);
  } else {
#pragma unroll
    for (int offset = S::kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
  }
}

// Whether every tensor (empty ones aside) can be read in vectors of N elements.
template <int N>
bool aligned_for(std::initializer_list<Tensor> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& t) {
    return !t || rows_aligned(t, static_cast<size_t>(N) * size_of(t.dtype));
  });
}

// fn(X, Y) for y's type and x of the same type or fp32.
template <typename Fn>
void visit_norm_types(DType x, DType y, Fn&& fn) {
  visit_device_dtype(y, [&](auto tag) {
    using Y = decltype(tag);
    if (x == y) return fn(Y{}, Y{});
    if constexpr (!std::is_same_v<Y, float>) fn(float{}, Y{});
  });
}

}  // namespace kernels::cuda

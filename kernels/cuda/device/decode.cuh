#pragma once
// Attention of a few rows over stored ones: what its kernels share. A row's visible slots form a list: the
// committed ones, then its ancestors and itself. The list is cut into chunks of kChunk places from place 0
// on; each chunk gives a maximum, a sum and a weighted sum of values, and a kernel takes these in an order
// that is given by their number alone. So a row's result is the same bits alone, in a chain or in a tree,
// however the chunks are shared out.
#include <cmath>
#include <cstdint>

#include "kernels/cuda/decode.h"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/device/functions.cuh"

namespace kernels::cuda {

inline constexpr int kChunk = 64;

// The place of the n-th set bit, from 0.
__device__ __forceinline__ int nth_bit(uint64_t mask, int n) {
  int place = 0;
#pragma unroll
  for (int width = 32; width > 0; width /= 2) {
    const int below = __popcll(mask & ((uint64_t{1} << width) - 1));
    if (n >= below) {
      n -= below;
      mask >>= width;
      place += width;
    }
  }
  return place;
}

// 1 / x as the hardware has it: relative error 2^-23.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// An address that is worked out where this stands, not where it is used.
template <typename T>
__device__ __forceinline__ void settle(const T* address) {
  asm volatile("{\n\t.reg .pred p;\n\tsetp.eq.u64 p, %0, -1;\n\t@p trap;\n\t}" ::"l"(address));
}

// What scales the old state and the chunk when a chunk is taken into (maximum, sum); logarithms are binary.
struct ChunkWeights {
  float state, chunk;
};
__device__ __forceinline__ ChunkWeights take_chunk(float& maximum, float& sum, float chunk_maximum,
                                                   float chunk_sum) {
  const float top = fmaxf(maximum, chunk_maximum);
  const ChunkWeights w{exp2_fast(maximum - top), exp2_fast(chunk_maximum - top)};
  sum = fmaf(sum, w.state, __fmul_rn(chunk_sum, w.chunk));
  maximum = top;
  return w;
}
__device__ __forceinline__ float take_value(float state, float chunk, const ChunkWeights& w) {
  return fmaf(state, w.state, __fmul_rn(chunk, w.chunk));
}

// The rows of a step and the caches they read and extend.
template <typename T>
struct SoftmaxDecode {
  const T *q, *k, *v;
  T *o, *cache_k, *cache_v;
  int64_t q_stride, k_stride, v_stride, o_stride, cache_k_stride, cache_v_stride;
  const int32_t *first_row, *lengths;
  const int64_t* ancestors;
  int sequences, heads, key_heads, width, capacity;
  float scale;  // of scores, for binary logarithms

  __device__ int length(int sequence) const { return min(max(lengths[sequence], 0), capacity); }
  // Key or value at a place of a row's list; `first` is the sequence's first row.
  __device__ const T* stored(const T* cache, int64_t cache_stride, const T* fresh, int64_t fresh_stride,
                             int sequence, int key_head, int length, int first, uint64_t ancestors,
                             int place) const {
    const int64_t column = int64_t{key_head} * width;
    if (place < length) return cache + sequence * cache_stride + int64_t{place} * key_heads * width + column;
    return fresh + (first + nth_bit(ancestors, place - length)) * fresh_stride + column;
  }
  __device__ const T* key(int sequence, int key_head, int length, int first, uint64_t mask, int place) const {
    return stored(cache_k, cache_k_stride, k, k_stride, sequence, key_head, length, first, mask, place);
  }
  __device__ const T* value(int sequence, int key_head, int length, int first, uint64_t mask,
                            int place) const {
    return stored(cache_v, cache_v_stride, v, v_stride, sequence, key_head, length, first, mask, place);
  }
  // Puts N elements of one head of a new row, from c on, into its slot. Nobody reads that slot in the same
  // launch.
  template <int N>
  __device__ void append(int sequence, int key_head, int length, int first, int row, int c) const {
    const int slot = length + row;
    if (slot >= capacity) return;
    const int64_t column = int64_t{key_head} * width + c, at = int64_t{slot} * key_heads * width + column;
    const auto key = load_vector<T, N>(k + (first + row) * k_stride + column);
    const auto value = load_vector<T, N>(v + (first + row) * v_stride + column);
    store_vector(cache_k + sequence * cache_k_stride + at, key);
    store_vector(cache_v + sequence * cache_v_stride + at, value);
  }
};

template <typename T>
SoftmaxDecode<T> step_of(const DecodeCall& c) {
  constexpr float kLog2e = 1.44269504088896341f;
  const auto data = [](const Tensor& x) { return static_cast<T*>(x.data); };
  return {.q = data(c.q),
          .k = data(c.k),
          .v = data(c.v),
          .o = data(c.o),
          .cache_k = data(c.cache_k),
          .cache_v = data(c.cache_v),
          .q_stride = c.q.row_stride,
          .k_stride = c.k.row_stride,
          .v_stride = c.v.row_stride,
          .o_stride = c.o.row_stride,
          .cache_k_stride = c.cache_k.row_stride,
          .cache_v_stride = c.cache_v.row_stride,
          .first_row = c.rows.first_row.as<int32_t>(),
          .lengths = c.rows.lengths.as<int32_t>(),
          .ancestors = c.rows.ancestors.as<int64_t>(),
          .sequences = static_cast<int>(c.cache_k.rows()),
          .heads = static_cast<int>(c.q.dim(1)),
          .key_heads = static_cast<int>(c.k.dim(1)),
          .width = static_cast<int>(c.q.dim(2)),
          .capacity = static_cast<int>(c.cache_k.dim(1)),
          .scale = kLog2e / std::sqrt(static_cast<float>(c.q.dim(2)))};
}

}  // namespace kernels::cuda

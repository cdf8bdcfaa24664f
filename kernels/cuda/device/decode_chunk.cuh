#pragma once
// What one warp computes of one chunk: the scores of 16 queries, their probabilities, the weighted sum of
// values. There is no other code for it, so the bits are those of the list of places alone: whether the
// places are stored or new, whether one of the queries counts or all do, and whoever computes the chunk.
//
// The order of a chunk's sums. A score: columns in steps of 16, ascending, one mma after another. The maximum
// has no order. The sum of probabilities, in fp32: lane t of four has places 8 n + 2 t + {0, 1}, pairs first,
// n ascending; then lanes (0 + 1) + (2 + 3). The weighted sum: probabilities in 16 bits, places in steps of
// 16, ascending. The second half of the places is left out where none of them is visible, which depends on
// their number alone.
//
// The order of chunks. Chunk c belongs to class c % kClasses. The chunks of a class are taken in ascending
// order, then the classes. So classes can be shared out, and up to kClasses chunks are taken in their order.
#include "kernels/cuda/device/decode.cuh"
#include "kernels/cuda/device/mma.cuh"

namespace kernels::cuda {

inline constexpr int kQueries = 16, kClasses = 32, kSteps = kChunk / 16;
inline constexpr int kTogether = 2;  // steps that are left out together

// Keys, values and queries in shared memory: rows are an odd number of 16 bytes apart, so that eight rows of
// a matrix lie in different banks.
template <int D>
inline constexpr int kRowBytes = (D + 8) * 2;
// Floats of a query's partial result there: values, then maximum and sum.
template <int D>
inline constexpr int kResult = D + 8;

// This lane has queries lane / 4 and lane / 4 + 8; of their weighted sums of values columns 8 n + 2 (lane %
// 4) + {0, 1}.
template <int D>
struct Partial {
  float maximum[2], sum[2], out[D / 8][4];
};

// Probabilities of 16 places a step, as left operands.
struct Weights {
  float maximum[2], sum[2];
  uint32_t p[kSteps][4];
};

// Of 16 rows of shared memory that are keys or queries and values: the row whose address this lane gives when
// they are fetched as matrices, and the bytes into it. Fetched so, operands lie in neighbouring registers.
__device__ __forceinline__ int key_row() { return threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8; }
__device__ __forceinline__ uint32_t key_column() { return threadIdx.x / 8 % 2 * 16; }
__device__ __forceinline__ int value_row() { return threadIdx.x % 16; }
__device__ __forceinline__ uint32_t value_column() { return threadIdx.x % 32 / 16 * 16; }

// Two steps of scores.
template <typename T, int D>
__device__ __forceinline__ void multiply_keys(uint32_t queries, const uint32_t* keys, float (*s)[4]) {
#pragma unroll
  for (int column = 0; column < D / 16; ++column) {
    uint32_t a[4];
    load_matrices(queries + column * 32, a);
#pragma unroll
    for (int step = 0; step < kTogether; ++step) {
      uint32_t b[4];
      load_matrices(keys[step] + column * 32, b);
      multiply_add<T>(s[2 * step], a[0], a[1], a[2], a[3], b[0], b[1]);
      multiply_add<T>(s[2 * step + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
  }
}

// Of two steps of scores only the first `visible` ones count; the largest of each query goes into `top`.
__device__ __forceinline__ void raise_maximum(float (*s)[4], int visible, float (&top)[2]) {
  constexpr int kScores = 2 * kTogether;
  const int place = threadIdx.x % 4 * 2;
  if (visible < kTogether * 16)
#pragma unroll
    for (int n = 0; n < kScores; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (n * 8 + place + i % 2 >= visible) s[n][i] = -INFINITY;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest[kScores];
#pragma unroll
    for (int n = 0; n < kScores; ++n) largest[n] = fmaxf(s[n][2 * half], s[n][2 * half + 1]);
    top[half] = fmaxf(top[half], fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3])));
  }
}

// Scores are scaled for binary logarithms. keys: addresses at key_column() of this lane's rows of each step.
template <typename T, int D>
__device__ __forceinline__ Weights weigh(uint32_t queries, const uint32_t (&keys)[kSteps], float scale,
                                         int visible) {
  constexpr int kHalf = 2 * kTogether;
  const bool both = visible > kTogether * 16;
  float s[2 * kSteps][4] = {};
  multiply_keys<T, D>(queries, keys, s);
  if (both) multiply_keys<T, D>(queries, keys + kTogether, s + kHalf);
  float top[2] = {-INFINITY, -INFINITY};
  raise_maximum(s, visible, top);
  if (both) raise_maximum(s + kHalf, visible - kTogether * 16, top);
  Weights w;
  w.maximum[0] = top[0], w.maximum[1] = top[1], w.sum[0] = w.sum[1] = 0;
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      w.maximum[half] = fmaxf(w.maximum[half], __shfl_xor_sync(0xffffffffu, w.maximum[half], lanes));
#pragma unroll
  for (int half = 0; half < 2; ++half) w.maximum[half] = __fmul_rn(w.maximum[half], scale);
#pragma unroll
  for (int n = 0; n < 2 * kSteps; ++n) {
    if (n == kHalf && !both) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float a = exp2_fast(fmaf(s[n][2 * half], scale, -w.maximum[half])),
                  b = exp2_fast(fmaf(s[n][2 * half + 1], scale, -w.maximum[half]));
      w.p[n / 2][n % 2 * 2 + half] = pack<T>(a, b);
      w.sum[half] += a + b;
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2)
#pragma unroll
    for (int half = 0; half < 2; ++half) w.sum[half] += __shfl_xor_sync(0xffffffffu, w.sum[half], lanes);
  return w;
}

// values: addresses at value_column() of this lane's rows of each step.
template <typename T, int D>
__device__ __forceinline__ Partial<D> weighted_sum(const Weights& w, const uint32_t (&values)[kSteps],
                                                   int visible) {
  Partial<D> x;
#pragma unroll
  for (int half = 0; half < 2; ++half) x.maximum[half] = w.maximum[half], x.sum[half] = w.sum[half];
#pragma unroll
  for (int n = 0; n < D / 8; ++n) x.out[n][0] = x.out[n][1] = x.out[n][2] = x.out[n][3] = 0;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (step == kTogether && step * 16 >= visible) break;
    const uint32_t(&p)[4] = w.p[step];
#pragma unroll
    for (int column = 0; column < D / 16; ++column) {
      uint32_t b[4];
      load_matrices_transposed(values[step] + column * 32, b);
      multiply_add<T>(x.out[2 * column], p[0], p[1], p[2], p[3], b[0], b[1]);
      multiply_add<T>(x.out[2 * column + 1], p[0], p[1], p[2], p[3], b[2], b[3]);
    }
  }
  return x;
}

// The next chunk of a class.
template <int D>
__device__ __forceinline__ void take(Partial<D>& state, const Partial<D>& x) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const ChunkWeights w = take_chunk(state.maximum[half], state.sum[half], x.maximum[half], x.sum[half]);
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i)
        state.out[n][i] = take_value(state.out[n][i], x.out[n][i], w);
  }
}

// Query lane / 4 + 8 half, to kResult floats.
template <int D>
__device__ __forceinline__ void store_result(const Partial<D>& x, int half, float* to) {
  const int lane = threadIdx.x % 32;
  if (lane % 4 == 0) *reinterpret_cast<float2*>(to + D) = {x.maximum[half], x.sum[half]};
#pragma unroll
  for (int n = 0; n < D / 8; ++n)
    *reinterpret_cast<float2*>(to + n * 8 + lane % 4 * 2) = {x.out[n][2 * half], x.out[n][2 * half + 1]};
}

// A query's partial results on the way to the result: two columns of the values.
struct Columns {
  float maximum = -INFINITY, sum = 0;
  float2 out = {0, 0};

  __device__ __forceinline__ void take(const Columns& x) {
    const ChunkWeights w = take_chunk(maximum, sum, x.maximum, x.sum);
    out.x = take_value(out.x, x.out.x, w), out.y = take_value(out.y, x.out.y, w);
  }
};

}  // namespace kernels::cuda

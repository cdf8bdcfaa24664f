#pragma once
// A warp's share of the row-invariant product (kernels/cuda/linear_rows.cu): tiles of weights and of x in
// registers, the norm of x there, and the products of the two.
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/device/matrix.cuh"
#include "kernels/ops/linear.h"

namespace kernels::cuda {

inline constexpr int kWarps = 8, kThreads = kWarps * 32;
inline constexpr int kWarpTiles = 3;  // tiles of a slice that one warp has: all of them are in flight at once
inline constexpr int kSliceTiles = kWarps * kWarpTiles;
inline constexpr int kMostCluster = 8;
inline constexpr int kGroup = 16;  // rows of x that a block has at most
inline constexpr int kNormVectors =
    kSliceTiles * kTileColumns / 8;       // of 16 bytes: a norm's gain, or its bias
inline constexpr int kPanel = kTileRows;  // outputs of a panel
inline constexpr int kTile = kTileRows * kTileColumns;
inline constexpr int kPitch = kPanel + 4;  // floats between the sums of two rows of x: no bank conflicts

struct RowsCall {
  const void *weights, *x, *bias, *residual;  // the last two may be null
  void* y;
  int64_t x_stride, residual_stride, y_stride;
  int rows, in, out;
  int panels, tiles, slices;  // tiles and slices of one panel
  bool gelu, y_fp32;
  const void *gain, *shift;  // of a norm ahead: null where there is none
  bool layer;
  float eps, share;  // share: 1 / in

  // Inputs of a warp where a block has all of them.
  __device__ int columns_of(int warp) const {
    int columns = 0;
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i)
      columns += min(max(in - (warp + i * kWarps) * static_cast<int>(kTileColumns), 0),
                     static_cast<int>(kTileColumns));
    return columns;
  }
};

// The tiles [first, last) of slice s.
struct Slice {
  int first, last;
};
__device__ __forceinline__ Slice slice_of(const RowsCall& a, int s) {
  return {a.tiles * s / a.slices, a.tiles * (s + 1) / a.slices};
}

// How a kernel reads x: element by element, in vectors, or in vectors of which a norm is computed; then one
// block has all inputs.
enum class Input { elements, vectors, norm };

// Weights are read once a step: in the caches they make way for what is read again, such as x, biases and the
// keys and values of attention.
__device__ __forceinline__ uint64_t read_once() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Volatile: issued where it stands, ahead of waiting for the previous kernel.
__device__ __forceinline__ uint4 load_weights(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(read_once()));
  return v;
}

// What a norm puts moments together with: 1 / this warp's inputs, and the inputs of the two warps whose
// moments this lane reads. Computed ahead of waiting.
struct NormShares {
  static constexpr int kApart = kWarps / 2;
  float own, low, high;
  __device__ void compute(const RowsCall& a, int warp, int lane) {
    own = __fdividef(1.0f, static_cast<float>(max(a.columns_of(warp), 1)));
    low = static_cast<float>(a.columns_of(lane % 4));
    high = static_cast<float>(a.columns_of(lane % 4 + kApart));
    asm volatile("" : "+f"(own), "+f"(low), "+f"(high));  // here, and not where they are used
  }
};

// Sum over the four lanes that share a row of x.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <typename T>
__device__ __forceinline__ void fetch_norm(const RowsCall& a, uint4 (*norm)[kNormVectors]) {
  const int which = threadIdx.x / kNormVectors, i = threadIdx.x % kNormVectors;
  const auto* from = static_cast<const T*>(which == 0 ? a.gain : a.shift);
  if (which < 2 && from && i * 8 < a.in) copy_16(&norm[which][i], from + i * 8, true);
  commit_copies();
}

template <typename T>
__device__ __forceinline__ void matrix_multiply_add(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

template <typename T>
__device__ __forceinline__ void store_output(const RowsCall& a, int n, int m, float y) {
  const int64_t place = n * a.y_stride + m;
  if (a.y_fp32)
    static_cast<float*>(a.y)[place] = y;
  else
    static_cast<T*>(a.y)[place] = from_float<T>(y);
}

// The first row of a block's group of x.
__device__ __forceinline__ int first_row() { return static_cast<int>(blockIdx.y) * kGroup; }

// Inputs [column, column + 16 bytes) of row n; zeros where there are none. With kVectors they are all there
// or none is.
template <typename T, bool kVectors>
__device__ __forceinline__ uint4 load_inputs(const RowsCall& a, int n, int column) {
  constexpr int kCount = 16 / sizeof(T);
  union {
    uint4 vector;
    T at[kCount];
  } v;
  v.vector = make_uint4(0, 0, 0, 0);
  const T* x = static_cast<const T*>(a.x) + n * a.x_stride + column;
  if constexpr (kVectors) {
    if (n < a.rows && column < a.in) v.vector = *reinterpret_cast<const uint4*>(x);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (n < a.rows && column + i < a.in) v.at[i] = x[i];
  }
  return v.vector;
}

// One warp's share of a slice of kPanels panels on the matrix units; kColumns mma columns of 8 rows of x. A
// lane holds, of a tile, two registers' worth of 8 weights: rows lane / 4 and lane / 4 + 8, inputs 8 (lane %
// 4) + 0..7; and of x the same inputs of row lane / 4.
template <typename T, int kColumns, int kPanels, bool kVectors>
struct WarpProduct {
  uint4 weights[kPanels][kWarpTiles][2], x[kWarpTiles][kColumns];
  float sum[kPanels][kColumns][4];

  __device__ __forceinline__ void fetch(const RowsCall& a, int panel, Slice s, int warp, int lane) {
    const auto* tiles = static_cast<const T*>(a.weights) + static_cast<int64_t>(panel) * a.tiles * kTile;
#pragma unroll
    for (int p = 0; p < kPanels; ++p)
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) {
        const int tile = s.first + warp + i * kWarps;
        if (tile >= s.last || panel + p >= a.panels) continue;
        const T* at = tiles + (static_cast<int64_t>(p) * a.tiles + tile) * kTile + lane * 8;
        weights[p][i][0] = load_weights(at);
        weights[p][i][1] = load_weights(at + kTile / 2);
      }
  }
  __device__ __forceinline__ void load_x(const RowsCall& a, Slice s, int warp, int lane) {
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      const int tile = s.first + warp + i * kWarps;
      if (tile >= s.last) continue;
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        x[i][c] =
            load_inputs<T, kVectors>(a, first_row() + c * 8 + lane / 4, tile * kTileColumns + lane % 4 * 8);
    }
  }
  // x becomes its norm. Of every row a warp gives the mean of its inputs and the squares around it; they are
  // put together in an order that depends on the number of inputs alone.
  __device__ __forceinline__ void normalise(const RowsCall& a, const NormShares& n, int warp, int lane,
                                            float2 (*moments)[kColumns * 8],
                                            const uint4 (*norm)[kNormVectors]) {
    const auto column = [&](int i) {
      return (warp + i * kWarps) * static_cast<int>(kTileColumns) + lane % 4 * 8;
    };
    const auto sum_of = [&](int c, auto term) {
      float all = 0;
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i)
        if (column(i) < a.in)
#pragma unroll
          for (int j = 0; j < 8; ++j) all = term(all, to_float(reinterpret_cast<const T*>(&x[i][c])[j]));
      return quad_sum(all);
    };
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      float mean = 0;
      if (a.layer) mean = __fmul_rn(sum_of(c, [](float s, float v) { return s + v; }), n.own);
      const float squares = sum_of(c, [&](float s, float v) { return fmaf(v - mean, v - mean, s); });
      if (lane % 4 == 0) moments[warp][c * 8 + lane / 4] = {mean, squares};
    }
    wait_copies<0>();
    __syncthreads();
    float mean[kColumns], r[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float2 m0 = moments[lane % 4][c * 8 + lane / 4],
                   m1 = moments[lane % 4 + n.kApart][c * 8 + lane / 4];
      mean[c] = __fmul_rn(quad_sum(fmaf(n.high, m1.x, __fmul_rn(n.low, m0.x))), a.share);
      const float d0 = m0.x - mean[c], d1 = m1.x - mean[c];
      const float squares = fmaf(__fmul_rn(n.low, d0), d0, m0.y) + fmaf(__fmul_rn(n.high, d1), d1, m1.y);
      r[c] = rsqrtf(fmaf(quad_sum(squares), a.share, a.eps));
    }
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      if (column(i) >= a.in) continue;
      const uint4 gain = norm[0][column(i) / 8], shift = a.shift ? norm[1][column(i) / 8] : uint4{};
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          T& at = reinterpret_cast<T*>(&x[i][c])[j];
          const float scaled = __fmul_rn(to_float(at) - mean[c], r[c]);
          at = from_float<T>(fmaf(scaled, to_float(reinterpret_cast<const T*>(&gain)[j]),
                                  to_float(reinterpret_cast<const T*>(&shift)[j])));
        }
    }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int p = 0; p < kPanels; ++p)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[p][c][0] = sum[p][c][1] = sum[p][c][2] = sum[p][c][3] = 0;
  }
  __device__ __forceinline__ void multiply(const RowsCall& a, Slice s, int warp) {
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      if (s.first + warp + i * kWarps >= s.last) continue;
#pragma unroll
      for (int p = 0; p < kPanels; ++p)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          matrix_multiply_add<T>(sum[p][c], weights[p][i][0], x[i][c].x, x[i][c].y);
          matrix_multiply_add<T>(sum[p][c], weights[p][i][1], x[i][c].z, x[i][c].w);
        }
    }
  }
  __device__ __forceinline__ void store(int panel, float* partial, int lane) const {
    const int m = lane / 4;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      float* at = partial + (c * 8 + lane % 4 * 2) * kPitch + m;
      at[0] = sum[panel][c][0];
      at[kPitch] = sum[panel][c][1];
      at[8] = sum[panel][c][2];
      at[kPitch + 8] = sum[panel][c][3];
    }
  }
};

// The same in fp32, by fused multiply-adds: a lane has output lane / 2 and, of each 8 inputs, 4.
template <int kColumns, bool kVectors>
struct WarpProduct<float, kColumns, 1, kVectors> {
  float sum[kColumns * 8];

  __device__ __forceinline__ void fetch(const RowsCall&, int panel, Slice, int, int) { panel_ = panel; }
  __device__ __forceinline__ void load_x(const RowsCall&, Slice, int, int) {}
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kColumns * 8; ++n) sum[n] = 0;
  }
  __device__ __forceinline__ void multiply(const RowsCall& a, Slice s, int warp) {
    const int lane = threadIdx.x % 32;
    const auto* tiles = static_cast<const float*>(a.weights) + static_cast<int64_t>(panel_) * a.tiles * kTile;
    for (int tile = s.first + warp; tile < s.last; tile += kWarps)
#pragma unroll 1
      for (int v = 0; v < 4; ++v) {
        const uint4 w = load_weights(tiles + static_cast<int64_t>(tile) * kTile + v * 128 + lane * 4);
        const int column = tile * kTileColumns + v * 8 + lane % 2 * 4;
#pragma unroll
        for (int n = 0; n < kColumns * 8; ++n) {
          const uint4 x = load_inputs<float, kVectors>(a, first_row() + n, column);
          sum[n] = __fmaf_rn(__uint_as_float(w.x), __uint_as_float(x.x), sum[n]);
          sum[n] = __fmaf_rn(__uint_as_float(w.y), __uint_as_float(x.y), sum[n]);
          sum[n] = __fmaf_rn(__uint_as_float(w.z), __uint_as_float(x.z), sum[n]);
          sum[n] = __fmaf_rn(__uint_as_float(w.w), __uint_as_float(x.w), sum[n]);
        }
      }
  }
  __device__ __forceinline__ void store(int, float* partial, int lane) const {
#pragma unroll
    for (int n = 0; n < kColumns * 8; ++n) {
      const float both = sum[n] + __shfl_xor_sync(0xffffffffu, sum[n], 1);
      if (lane % 2 == 0) partial[n * kPitch + lane / 2] = both;
    }
  }

 private:
  int panel_;
};

}  // namespace kernels::cuda

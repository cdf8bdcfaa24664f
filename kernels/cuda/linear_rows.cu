// The row-invariant linear layer of decoding: at most 64 rows of x against all of W, bound by reading W once.
//
// A tile is 16 outputs by 32 inputs. fp16 and bf16 tiles are the 16 x 16 operands of two mma.m16n8k16, whose
// 8 columns are rows of x: what a column holds does not depend on its neighbours. Which input of the tile
// stands for which k of the mma is free as long as both operands agree; here a lane's 8 inputs are neighbours
// in x.
//
// Every output is summed in one order, given by the number of inputs and the kind of GPU alone. The tiles of
// a panel (16 outputs, all inputs) are cut into slices, and the slices dealt out to the blocks of a cluster;
// in a slice each warp has every eighth tile. The warps of a block are added in order, then the blocks.
#include <algorithm>

#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/ops/linear.h"

namespace kernels::cuda {

namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kWarpTiles = 3;  // tiles of a slice that one warp has: all of them are in flight at once
constexpr int kSliceTiles = kWarps * kWarpTiles;
constexpr int kMostCluster = 8;
constexpr int kPanel = kTileRows;  // outputs of a panel
constexpr int kTile = kTileRows * kTileColumns;
constexpr int kPitch = kPanel + 4;  // floats between the sums of two rows of x: no bank conflicts

struct Arguments {
  const void *weights, *x, *bias, *residual;  // the last two may be null
  void* y;
  int64_t x_stride, residual_stride, y_stride;
  int rows, in, out;
  int panels, tiles, slices;  // tiles and slices of one panel
  bool gelu, y_fp32;
};

// The tiles [first, last) of slice s.
struct Slice {
  int first, last;
  __device__ Slice(const Arguments& a, int s)
      : first(a.tiles * s / a.slices), last(a.tiles * (s + 1) / a.slices) {}
};

// Weights are read once a step: in the caches they make way for what is read again, such as x, biases and the
// keys and values of attention. Volatile: issued where it stands, ahead of waiting for the previous kernel.
__device__ __forceinline__ uint4 load_weights(const void* p) {
  uint4 v;
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(policy));
  return v;
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

// Inputs [column, column + 16 bytes) of row n of x; zeros where there are none. With kVectors they are all
// there or none is.
template <typename T, bool kVectors>
__device__ __forceinline__ uint4 load_inputs(const Arguments& a, int n, int column) {
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

// One warp's share of a slice on the matrix units; kColumns mma columns of 8 rows of x. A lane holds, of a
// tile, two registers' worth of 8 weights: rows lane / 4 and lane / 4 + 8, inputs 8 (lane % 4) + 0..7; and of
// x the same inputs of row lane / 4.
template <typename T, int kColumns, bool kVectors>
struct WarpProduct {
  uint4 weights[kWarpTiles][2], x[kWarpTiles][kColumns];
  float sum[kColumns][4];

  __device__ __forceinline__ void fetch(const Arguments& a, int panel, int slice, int warp, int lane) {
    const Slice s(a, slice);
    const auto* tiles = static_cast<const T*>(a.weights) + static_cast<int64_t>(panel) * a.tiles * kTile;
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      const int tile = s.first + warp + i * kWarps;
      if (tile >= s.last) continue;
      const T* p = tiles + static_cast<int64_t>(tile) * kTile + lane * 8;
      weights[i][0] = load_weights(p);
      weights[i][1] = load_weights(p + kTile / 2);
    }
  }
  __device__ __forceinline__ void load_x(const Arguments& a, int slice, int warp, int lane) {
    const Slice s(a, slice);
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      const int tile = s.first + warp + i * kWarps;
      if (tile >= s.last) continue;
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        x[i][c] = load_inputs<T, kVectors>(a, c * 8 + lane / 4, tile * kTileColumns + lane % 4 * 8);
    }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[c][0] = sum[c][1] = sum[c][2] = sum[c][3] = 0;
  }
  __device__ __forceinline__ void multiply(const Arguments& a, int slice, int warp) {
    const Slice s(a, slice);
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      if (s.first + warp + i * kWarps >= s.last) continue;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        matrix_multiply_add<T>(sum[c], weights[i][0], x[i][c].x, x[i][c].y);
        matrix_multiply_add<T>(sum[c], weights[i][1], x[i][c].z, x[i][c].w);
      }
    }
  }
  __device__ __forceinline__ void store(float* partial, int lane) const {
    const int m = lane / 4;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      float* p = partial + (c * 8 + lane % 4 * 2) * kPitch + m;
      p[0] = sum[c][0];
      p[kPitch] = sum[c][1];
      p[8] = sum[c][2];
      p[kPitch + 8] = sum[c][3];
    }
  }
};

// The same in fp32, by fused multiply-adds: a lane has output lane / 2 and, of each 8 inputs, 4.
template <int kColumns, bool kVectors>
struct WarpProduct<float, kColumns, kVectors> {
  float sum[kColumns * 8];

  __device__ __forceinline__ void fetch(const Arguments& a, int panel, int, int, int) { panel_ = panel; }
  __device__ __forceinline__ void load_x(const Arguments&, int, int, int) {}
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kColumns * 8; ++n) sum[n] = 0;
  }
  __device__ __forceinline__ void multiply(const Arguments& a, int slice, int warp) {
    const Slice s(a, slice);
    const int lane = threadIdx.x % 32;
    const auto* tiles = static_cast<const float*>(a.weights) + static_cast<int64_t>(panel_) * a.tiles * kTile;
    for (int tile = s.first + warp; tile < s.last; tile += kWarps)
#pragma unroll 1
      for (int v = 0; v < 4; ++v) {
        const uint4 w = load_weights(tiles + static_cast<int64_t>(tile) * kTile + v * 128 + lane * 4);
        const int column = tile * kTileColumns + v * 8 + lane % 2 * 4;
#pragma unroll
        for (int n = 0; n < kColumns * 8; ++n) {
          const uint4 x = load_inputs<float, kVectors>(a, n, column);
          sum[n] = __fmaf_rn(__uint_as_float(w.x), __uint_as_float(x.x), sum[n]);
          sum[n] = __fmaf_rn(__uint_as_float(w.y), __uint_as_float(x.y), sum[n]);
          sum[n] = __fmaf_rn(__uint_as_float(w.z), __uint_as_float(x.z), sum[n]);
          sum[n] = __fmaf_rn(__uint_as_float(w.w), __uint_as_float(x.w), sum[n]);
        }
      }
  }
  __device__ __forceinline__ void store(float* partial, int lane) const {
#pragma unroll
    for (int n = 0; n < kColumns * 8; ++n) {
      const float both = sum[n] + __shfl_xor_sync(0xffffffffu, sum[n], 1);
      if (lane % 2 == 0) partial[n * kPitch + lane / 2] = both;
    }
  }

 private:
  int panel_;
};

__device__ __forceinline__ float gelu_of(float x) {
  const float twice_u = 1.5957691216057308f * x * (1 + 0.044715f * x * x);
  return x / (1 + expf(-twice_u));
}

// This thread's share of a panel's outputs, which are dealt out to the threads of all blocks of a cluster,
// and what is added to the sums there: fetched ahead of them.
template <typename T, int kColumns>
struct Outputs {
  static constexpr int kCount = std::max(kColumns * 8 * kPanel / kThreads, 1);
  T bias[kCount], residual[kCount];

  static __device__ __forceinline__ int element(int i) {
    return static_cast<int>(cluster_rank() + (threadIdx.x + i * kThreads) * cluster_size());
  }
  // The row and the column of y.
  struct Place {
    int n, m;
    bool inside;
    __device__ Place(const Arguments& a, int panel, int element)
        : n(element / kPanel), m(panel * kPanel + element % kPanel), inside(n < a.rows && m < a.out) {}
  };

  __device__ __forceinline__ void load_bias(const Arguments& a, int panel) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Place at(a, panel, element(i));
      bias[i] = a.bias && at.inside ? static_cast<const T*>(a.bias)[at.m] : T(0.0f);
    }
  }
  __device__ __forceinline__ void load_residual(const Arguments& a, int panel) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Place at(a, panel, element(i));
      residual[i] = a.residual && at.inside
                        ? static_cast<const T*>(a.residual)[at.n * a.residual_stride + at.m]
                        : T(0.0f);
    }
  }
  __device__ __forceinline__ void write(const Arguments& a, int panel, int i, float sum) const {
    const Place at(a, panel, element(i));
    if (!at.inside) return;
    sum += to_float(bias[i]);
    if (a.gelu) sum = gelu_of(sum);
    sum += to_float(residual[i]);
    const int64_t place = at.n * a.y_stride + at.m;
    if (a.y_fp32)
      static_cast<float*>(a.y)[place] = sum;
    else
      static_cast<T*>(a.y)[place] = from_float<T>(sum);
  }
};

// Adds the warps' sums, then the blocks', and writes one panel's outputs.
template <typename T, int kColumns>
__device__ __forceinline__ void finish(const Arguments& a, int panel, const Outputs<T, kColumns>& outputs,
                                       const float (*partial)[kColumns * 8 * kPitch], float* block_sum) {
  const int blocks = static_cast<int>(cluster_size()), elements = a.rows * kPanel;
  const auto sum_of_warps = [&](int e) {
    const int place = e / kPanel * kPitch + e % kPanel;
    float sum = partial[0][place];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += partial[w][place];
    return sum;
  };
  if (blocks > 1) {
#pragma unroll 1
    for (int e = threadIdx.x; e < elements; e += kThreads) block_sum[e] = sum_of_warps(e);
    cluster_sync();
  }
#pragma unroll
  for (int i = 0; i < outputs.kCount; ++i) {
    const int e = outputs.element(i);
    if (e >= elements) continue;
    float sum = blocks == 1 ? sum_of_warps(e) : 0;
    if (blocks > 1)
#pragma unroll 4
      for (int r = 0; r < blocks; ++r) sum += cluster_shared(block_sum, r)[e];
    outputs.write(a, panel, i, sum);
  }
  // Before the sums are overwritten, and before a block leaves while others read them.
  if (blocks > 1)
    cluster_sync();
  else
    __syncthreads();
}

// Blocks of a multiprocessor: as many as the registers that hold x leave room for.
template <int kColumns>
inline constexpr int kResident = kColumns == 1   ? 3
                                 : kColumns <= 4 ? 2
                                                 : 1;

template <typename T, int kColumns, bool kVectors>
__global__ void __launch_bounds__(kThreads, kResident<kColumns>) rows_kernel(const Arguments a) {
  __shared__ float partial[kWarps][kColumns * 8 * kPitch], block_sum[kColumns * 8 * kPanel];
  const int blocks = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_rank());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int groups = static_cast<int>(gridDim.x) / blocks;
  int panel = static_cast<int>(blockIdx.x) / blocks, loaded = -1;
  WarpProduct<T, kColumns, kVectors> product;
  Outputs<T, kColumns> outputs;
  product.fetch(a, panel, rank, warp, lane);
  outputs.load_bias(a, panel);
  let_next_start();
  wait_for_previous();
  for (; panel < a.panels; panel += groups) {
    outputs.load_residual(a, panel);
    product.clear();
    for (int slice = rank; slice < a.slices; slice += blocks) {
      if (loaded != slice) product.load_x(a, slice, warp, lane);
      loaded = slice;
      product.multiply(a, slice, warp);
      // In flight while this panel is finished.
      if (slice + blocks < a.slices)
        product.fetch(a, panel, slice + blocks, warp, lane);
      else if (panel + groups < a.panels)
        product.fetch(a, panel + groups, rank, warp, lane);
    }
    product.store(partial[warp], lane);
    __syncthreads();
    finish<T, kColumns>(a, panel, outputs, partial, block_sum);
    outputs.load_bias(a, panel + groups);
  }
}

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

template <typename T>
__global__ void pack_kernel(const T* matrix, int64_t stride, int out, int in, int tiles, T* panels) {
  const int64_t tile = blockIdx.x;
  const int2 place = place_in_tile<T>(static_cast<int>(threadIdx.x));
  const int64_t row = tile / tiles * kTileRows + place.x, column = tile % tiles * kTileColumns + place.y;
  panels[tile * kTile + threadIdx.x] = row < out && column < in ? matrix[row * stride + column] : T(0.0f);
  // The kernel behind this one may read the panels before it waits.
  __threadfence();
}

template <typename T, int kColumns, bool kVectors>
void run(const Context& ctx, const Arguments& a) {
  const int cluster = has_clusters() ? std::min(a.slices, kMostCluster) : 1;
  const int groups = std::clamp(multiprocessors() * kResident<kColumns> / cluster, 1, a.panels);
  launch(ctx, "linear",
         {.grid = dim3(static_cast<unsigned>(groups * cluster)),
          .block = dim3(kThreads),
          .cluster = static_cast<unsigned>(cluster),
          .dependent = true},
         rows_kernel<T, kColumns, kVectors>, a);
}

template <typename T>
void run_rows(const Context& ctx, const Arguments& a, bool vectors) {
  if (!vectors) return run<T, 8, false>(ctx, a);
  if (a.rows <= 8) return run<T, 1, true>(ctx, a);
  if (a.rows <= 16) return run<T, 2, true>(ctx, a);
  if (a.rows <= 32) return run<T, 4, true>(ctx, a);
  return run<T, 8, true>(ctx, a);
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

void linear_rows(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor y, bool gelu,
                 const Tensor& residual) {
  if (x.rows() == 0) return;
  const int tiles = static_cast<int>(w.panels.dim(1));
  const auto bytes = static_cast<int64_t>(size_of(x.dtype));
  const Arguments a{.weights = w.panels.data,
                    .x = x.data,
                    .bias = w.bias.data,
                    .residual = residual.data,
                    .y = y.data,
                    .x_stride = x.row_stride,
                    .residual_stride = residual.row_stride,
                    .y_stride = y.row_stride,
                    .rows = static_cast<int>(x.rows()),
                    .in = static_cast<int>(x.cols()),
                    .out = static_cast<int>(y.cols()),
                    .panels = static_cast<int>(w.panels.dim(0)),
                    .tiles = tiles,
                    .slices = (tiles + kSliceTiles - 1) / kSliceTiles,
                    .gelu = gelu,
                    .y_fp32 = y.dtype == DType::f32};
  // Rows of x that consist of whole 16 bytes, aligned. Others are rare, and need not be fast.
  const bool vectors = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.row_stride * bytes % 16 == 0 &&
                       x.cols() * bytes % 16 == 0;
  visit_device_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    run_rows<T>(ctx, a, vectors);
  });
}

}  // namespace kernels::cuda

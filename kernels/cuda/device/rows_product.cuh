#pragma once
// A warp's share of the row-invariant product (kernels/cuda/linear_rows.cu): tiles of weights and of x in
// registers, the norm of x there, and the products of the two.
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/ops/linear.h"

namespace kernels::cuda {

inline constexpr int kWarps = 8, kThreads = kWarps * 32;
inline constexpr int kWarpTiles = 3;  // tiles of a slice that one warp has: all of them are in flight at once
inline constexpr int kSliceTiles = kWarps * kWarpTiles;
inline constexpr int kMostCluster = 8;
inline constexpr int kGroup = 16;         // rows of x that a block has at most
inline constexpr int kPanel = kTileRows;  // outputs of a panel
inline constexpr int kTile = kTileRows * kTileColumns;
inline constexpr int kPitch = kPanel + 4;  // floats between the sums of two rows of x: no bank conflicts

struct RowsCall {
  const void *weights, *x, *bias, *residual;  // the last two may be null
  void* y;
  int64_t x_stride, residual_stride, y_stride;
  int rows, in, out;
  int panels, tiles, slices;  // tiles and slices of one panel
  int slice_tiles;            // of every slice but the last, which may have fewer
  int blocks;                 // of a cluster
  unsigned inverse;           // 65536 / blocks, rounded up
  bool gelu, y_fp32;
  const void* gain;    // of a norm ahead: null where there is none
  const float2* sums;  // W gain, and W shift and the bias, of each output
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
  return {min(s * a.slice_tiles, a.tiles), min((s + 1) * a.slice_tiles, a.tiles)};
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

// As load_weights, to shared memory in the background.
__device__ __forceinline__ void copy_weights(uint4* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "l"(read_once())
               : "memory");
}

// The weights of a slice of kPanels panels; of a tile of its warp a lane reads two vectors of 8. Those of one
// panel it holds in registers. Those of several stand in shared memory, as they do in the panels, so that
// registers are left to the next kernel. One thread asks for them, a panel at a time: a block that starts
// early takes little from the kernel that still runs, and its other loads do not queue behind them. Below
// sm_90 a lane copies what it reads. In place of tiles beyond the slice, for which x is 0, there are zeros or
// the slice's first tile.
template <typename T, int kPanels>
class BlockWeights {
 public:
  static constexpr bool kShared = kPanels > 1;
  static constexpr unsigned kSharedBytes = kShared ? kPanels * kSliceTiles * kTile * sizeof(T) : 0;

  // Where they are shared, a barrier has to follow.
  __device__ __forceinline__ explicit BlockWeights(uint4* shared)
      : shared_(shared + threadIdx.x / 32 * kVectors + threadIdx.x % 32) {
#if __CUDA_ARCH__ >= 900
    if constexpr (kShared) {
      __shared__ uint64_t arrived;
      arrived_ = shared_address(&arrived);
      if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(arrived_) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      }
      __syncwarp();  // the thread that asks for weights need not be the one that was here, for racecheck
    }
#endif
  }
  // All threads; where they are shared, when all have read what was fetched before.
  __device__ __forceinline__ void fetch(const RowsCall& a, int panel, Slice s, int warp, int lane) {
    if constexpr (kShared) return share(a, panel, s);
    const T* from = place_of(a, panel, s.first + warp) + lane * 8;
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        held_[i][half] = s.first + warp + i * kWarps < s.last
                             ? load_weights(from + i * kWarps * kTile + half * (kTile / 2))
                             : uint4{};
  }
  __device__ __forceinline__ void wait() const {
    if constexpr (!kShared) return;
#if __CUDA_ARCH__ >= 900
    wait_for_phase<false>(arrived_, fetches_ - 1);
#else
    wait_for_copies<0>();
#endif
  }
  __device__ __forceinline__ uint4 at(int panel, int tile, int half) const {
    if constexpr (!kShared) return held_[tile][half];
    return shared_[place(panel, half) + tile_[tile]];
  }

 private:
  static constexpr int kVectors = kTile * sizeof(T) / sizeof(uint4);  // of a tile
  static __device__ __forceinline__ constexpr int place(int panel, int half) {
    return panel * kSliceTiles * kVectors + half * (kVectors / 2);
  }
  static __device__ __forceinline__ const T* place_of(const RowsCall& a, int panel, int tile) {
    return static_cast<const T*>(a.weights) +
           (static_cast<int64_t>(min(panel, a.panels - 1)) * a.tiles + tile) * kTile;
  }
  __device__ __forceinline__ void share(const RowsCall& a, int panel, Slice s) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i)
      tile_[i] = (s.first + warp + i * kWarps < s.last ? i * kWarps : -warp) * kVectors;
#if __CUDA_ARCH__ >= 900
    ++fetches_;
    if (threadIdx.x != 0) return;
    const unsigned bytes = static_cast<unsigned>(s.last - s.first) * kTile * sizeof(T);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrived_),
                 "r"(bytes * kPanels)
                 : "memory");
#pragma unroll
    for (int p = 0; p < kPanels; ++p)
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
          "[%3], %4;" ::"r"(shared_address(shared_ + place(p, 0))),
          "l"(place_of(a, panel + p, s.first)), "r"(bytes), "r"(arrived_), "l"(read_once())
          : "memory");
#else
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      const T* from = place_of(a, panel + p, s.first) + threadIdx.x % 32 * 8;
      // Every warp copies what it reads, the block's first tile among it.
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          copy_weights(shared_ + place(p, half) + tile_[i],
                       from + (warp * kVectors + tile_[i]) / kVectors * kTile + half * (kTile / 2));
    }
    end_copies();
#endif
  }

  uint4* shared_;
  uint32_t arrived_ = 0;
  int fetches_ = 0;
  int tile_[kWarpTiles];  // where this warp's tiles stand
  uint4 held_[kWarpTiles][2];
};

// An address in global memory is computed here, and not where it is used.
template <typename T>
__device__ __forceinline__ void keep_global(T*& p) {
  asm volatile("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
}

// A lane's way to its part of x: from which element on, of each of its rows, and how many of a warp's tiles
// it has inputs of. Rows beyond those of x are its last row: nobody reads their sums.
//
// Up to 8 rows a lane reads what it multiplies: 16 bytes of row lane / 4. A warp then touches 64 bytes of
// each row at once, for which the first-level cache takes twice as long as for whole lines. So in a block
// with 16 rows a warp reads two whole ones, and the lanes get their part in shared memory.
template <typename T, int kColumns>
struct WayToX {
  static constexpr bool kLines = kColumns > 1;
  static constexpr int kPiece = 32 * 8, kPieces = kWarpTiles;  // of a row
  static_assert(kPieces * kPiece == kSliceTiles * kTileColumns);
  const T* row[kColumns];
  int tiles, pieces;
  __device__ __forceinline__ WayToX(const RowsCall& a, Slice s, int warp, int lane) {
    const int tile = s.first + warp, column = tile * static_cast<int>(kTileColumns) + lane % 4 * 8;
    tiles = 0;
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i)
      tiles += tile + i * kWarps < s.last && column + i * kWarps * static_cast<int>(kTileColumns) < a.in;
    const int begin = s.first * static_cast<int>(kTileColumns) + lane * 8;
    pieces = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      pieces += begin + i * kPiece < min(s.last * static_cast<int>(kTileColumns), a.in);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int n = kLines ? warp * kColumns + c : lane / 4;
      row[c] = static_cast<const T*>(a.x) + min(first_row() + n, a.rows - 1) * a.x_stride +
               min(kLines ? begin : column, a.in - 1);
    }
  }
  // Computed here, and not behind a wait that follows: the assembler, too, moves what nothing needs.
  __device__ __forceinline__ void keep() {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      keep_global(row[c]);
      asm volatile("prefetch.global.L2 [%0];" ::"l"(row[c]));
    }
    asm volatile("" : "+r"(tiles), "+r"(pieces));
  }
};

// Where a block's rows of x change lanes. Pitch: no bank conflicts.
template <int kColumns>
struct SharedX {
  static constexpr int kPitch = kSliceTiles * 4 + 4;
  uint4 rows[(kColumns > 1 ? kGroup : 1) * kPitch];
};

// One warp's share of a slice of kPanels panels on the matrix units; kColumns mma columns of 8 rows of x. A
// lane holds, of a tile, two registers' worth of 8 weights: rows lane / 4 and lane / 4 + 8, inputs 8 (lane %
// 4) + 0..7; and of x the same inputs of row lane / 4.
template <typename T, int kColumns, int kPanels, bool kVectors>
struct WarpProduct {
  using Way = WayToX<T, kColumns>;
  static constexpr bool kLines = kVectors && Way::kLines;
  BlockWeights<T, kPanels> weights;
  uint4 x[kWarpTiles][kColumns];
  float sum[kPanels][kColumns][4];

  __device__ __forceinline__ explicit WarpProduct(uint4* shared) : weights(shared) {}
  __device__ __forceinline__ void fetch(const RowsCall& a, int panel, Slice s, int warp, int lane) {
    weights.fetch(a, panel, s, warp, lane);
  }
  __device__ __forceinline__ void load_x(const RowsCall& a, const Way& way, Slice s, int warp, int lane) {
    constexpr int kApart = kLines ? Way::kPiece : kWarps * static_cast<int>(kTileColumns);
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if constexpr (kVectors) {
          x[i][c] = make_uint4(0, 0, 0, 0);
          if (i < (kLines ? way.pieces : way.tiles))
            x[i][c] = *reinterpret_cast<const uint4*>(way.row[c] + i * kApart);
        } else {
          const int tile = s.first + warp + i * kWarps;
          x[i][c] = make_uint4(0, 0, 0, 0);
          if (tile < s.last)
            x[i][c] =
                load_inputs<T, false>(a, first_row() + c * 8 + lane / 4, tile * kTileColumns + lane % 4 * 8);
        }
  }
  // x to the lanes that multiply it. A barrier has to follow before `shared` is used again.
  __device__ __forceinline__ void exchange_x(int warp, int lane, SharedX<kColumns>& shared) {
    if constexpr (!kLines) return;
    constexpr int kPitch = SharedX<kColumns>::kPitch;
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        shared.rows[(warp * kColumns + c) * kPitch + i * 32 + lane] = x[i][c];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        x[i][c] = shared.rows[(c * 8 + lane / 4) * kPitch + (warp + i * kWarps) * 4 + lane % 4];
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int p = 0; p < kPanels; ++p)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[p][c][0] = sum[p][c][1] = sum[p][c][2] = sum[p][c][3] = 0;
  }
  __device__ __forceinline__ void multiply(const RowsCall&, Slice, int) {
    weights.wait();
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i)
#pragma unroll
      for (int p = 0; p < kPanels; ++p) {
        const uint4 low = weights.at(p, i, 0), high = weights.at(p, i, 1);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          matrix_multiply_add<T>(sum[p][c], low, x[i][c].x, x[i][c].y);
          matrix_multiply_add<T>(sum[p][c], high, x[i][c].z, x[i][c].w);
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
  static constexpr bool kLines = false;
  struct Way {
    __device__ __forceinline__ Way(const RowsCall&, Slice, int, int) {}
    __device__ __forceinline__ void keep() {}
  };
  float sum[kColumns * 8];

  __device__ __forceinline__ explicit WarpProduct(uint4*) {}
  __device__ __forceinline__ void fetch(const RowsCall&, int panel, Slice, int, int) { panel_ = panel; }
  __device__ __forceinline__ void load_x(const RowsCall&, const Way&, Slice, int, int) {}
  __device__ __forceinline__ void exchange_x(int, int, SharedX<kColumns>&) {}
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

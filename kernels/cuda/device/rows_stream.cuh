#pragma once
// The row-invariant product (kernels/cuda/linear_rows.cu) where panels are many and rows more than a
// WarpProduct holds: a block reads a weight once for all its rows of x, which stand in shared memory as the
// matrix units take them.
//
// A warp has whole panels. What the warps of a block compute beside each other in the other form are the
// units of a panel here, eight a slice: a warp computes and adds them one behind the other, in the order in
// which the other form adds warps and blocks. So there are no sums to exchange, and once x is there the warps
// run apart. Weights come through a ring of units in shared memory; a thread reads what it has copied itself
// and waits for its own copies alone.
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/rows_product.cuh"

namespace kernels::cuda {

inline constexpr int kRingUnits = 4;  // of a warp: at least three are on their way at any time
inline constexpr int kUnitVectors = kWarpTiles * 2 * 32;  // of 16 bytes: a unit's weights

// Bytes of shared memory against kColumns * 8 rows of x.
constexpr unsigned stream_shared(int tiles, int columns) {
  return static_cast<unsigned>(tiles * columns * 32 + kWarps * kRingUnits * kUnitVectors) * sizeof(uint4);
}

// The units of a warp's panels in the order in which they are computed.
template <typename T>
struct WeightRing {
  uint4* ring;  // this lane's part of this warp's
  // The next unit to be fetched, and the slot it goes to, which is to be read ahead of that.
  int panel;
  Slice tiles;
  int slice = 0, unit = 0, slot = 0;

  __device__ __forceinline__ const uint4& weights(int tile, int half) const {
    return ring[slot * kUnitVectors + (tile * 2 + half) * 32];
  }
  __device__ __forceinline__ void fetch(const RowsCall& a, int lane, int stride) {
    if (panel < a.panels) {
      const int first = tiles.first + unit;
      const T* from = static_cast<const T*>(a.weights) +
                      (static_cast<int64_t>(panel) * a.tiles + first) * kTile + lane * 8;
      uint4* to = ring + slot * kUnitVectors;
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) {
        if (first + i * kWarps >= tiles.last) continue;
        copy_weights(to + i * 64, from + i * kWarps * kTile);
        copy_weights(to + i * 64 + 32, from + i * kWarps * kTile + kTile / 2);
      }
    }
    // One group a unit, even of nothing: they are waited for by count.
    end_copies();
    slot = slot + 1 == kRingUnits ? 0 : slot + 1;
    if (++unit < kWarps) return;
    unit = 0;
    if (++slice == a.slices) {
      slice = 0;
      panel += stride;
    }
    tiles = slice_of(a, slice);
  }
};

// Where a lane's 8 inputs of a tile stand among the tile's: beside those of the next tile, in other banks.
__device__ __forceinline__ int lane_place(int tile, int lane) { return lane ^ tile % 2 * 4; }

// The rows of x from first_row on, as [tile][column][lane_place]. A warp reads whole lines, each of one row.
template <typename T, int kColumns>
__device__ __forceinline__ void share_x(const RowsCall& a, int first_row, uint4* x) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 3
  for (int piece = static_cast<int>(threadIdx.x) % 32; piece < a.tiles * 4; piece += 32) {
    const int tile = piece / 4;
    uint4* to = x + tile * kColumns * 32 + lane_place(tile, warp * 4 + piece % 4);
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      to[c * 32] = load_inputs<T, true>(a, first_row + c * 8 + warp, piece * 8);
  }
}

// The sums of one panel; lanes hold them as the matrix units give them.
template <typename T, int kColumns>
struct PanelSums {
  float all[kColumns][4];

  __device__ __forceinline__ void set(float value) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) all[c][0] = all[c][1] = all[c][2] = all[c][3] = value;
  }
  __device__ __forceinline__ void add(const PanelSums& other) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int j = 0; j < 4; ++j) all[c][j] += other.all[c][j];
  }
  // The next unit of the ring, of which [first, last) are the tiles.
  __device__ __forceinline__ void multiply(const WeightRing<T>& ring, int first, int last, const uint4* x,
                                           int lane) {
    static_assert(kWarps % 2 == 0);
    x += lane_place(first, lane);
    const auto multiply_tile = [&](int i) {
      const uint4 low = ring.weights(i, 0), high = ring.weights(i, 1);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const uint4 inputs = x[((first + i * kWarps) * kColumns + c) * 32];
        matrix_multiply_add<T>(all[c], low, inputs.x, inputs.y);
        matrix_multiply_add<T>(all[c], high, inputs.z, inputs.w);
      }
    };
    // Without branches the next tile is read while one is multiplied.
    if (first + (kWarpTiles - 1) * kWarps < last)
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) multiply_tile(i);
    else
#pragma unroll
      for (int i = 0; i < kWarpTiles - 1; ++i)
        if (first + i * kWarps < last) multiply_tile(i);
  }
  __device__ __forceinline__ void write(const RowsCall& a, int panel, int first_row, int lane) const {
    const auto* bias = static_cast<const T*>(a.bias);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int m = panel * kPanel + lane / 4 + j / 2 * 8;
      const float add = bias && m < a.out ? to_float(bias[m]) : 0.0f;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int n = first_row + c * 8 + lane % 4 * 2 + j % 2;
        // No residual is 0: -0 becomes 0.
        if (n < a.rows && m < a.out) store_output<T>(a, n, m, all[c][j] + add + 0.0f);
      }
    }
  }
};

// One slice, or as many as a cluster has blocks. Plain outputs: no gelu, residual or norm.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, 1) stream_kernel(const RowsCall a) {
  extern __shared__ uint4 shared_vectors[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = static_cast<int>(blockIdx.y) * kColumns * 8;
  const int start = static_cast<int>(blockIdx.x + gridDim.x * warp);
  const int stride = static_cast<int>(gridDim.x) * kWarps;
  uint4* x = shared_vectors;
  WeightRing<T> ring{x + a.tiles * kColumns * 32 + warp * kRingUnits * kUnitVectors + lane, start,
                     slice_of(a, 0)};
  let_next_start();
#pragma unroll 1
  for (int i = 0; i < kRingUnits; ++i) ring.fetch(a, lane, stride);
  wait_for_previous();
  share_x<T, kColumns>(a, first_row, x);
  __syncthreads();
  // -0 is nothing to a sum. The other form adds the blocks of a cluster to 0.
  const float nothing = a.slices == 1 ? -0.0f : 0.0f;
  for (int panel = start; panel < a.panels; panel += stride) {
    PanelSums<T, kColumns> total, slice, unit;
    total.set(nothing);
    for (int s = 0; s < a.slices; ++s) {
      const Slice tiles = slice_of(a, s);
      slice.set(-0.0f);
#pragma unroll 1
      for (int w = 0; w < kWarps; ++w) {
        unit.set(0);
        wait_for_copies<kRingUnits - 1>();
        unit.multiply(ring, tiles.first + w, tiles.last, x, lane);
        ring.fetch(a, lane, stride);
        slice.add(unit);
      }
      total.add(slice);
    }
    total.write(a, panel, first_row, lane);
  }
}

}  // namespace kernels::cuda

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
//
// Rows of x beyond 16 are other blocks' work (blockIdx.y): they read the same weights at the same time, from
// level 2, and a block that holds fewer rows needs half the registers, so that blocks of the next kernel find
// room beside it. Where panels are many, as in a vocabulary, that is bound by level 2, and rows_stream.cuh
// has another form of the same sums.
//
// A norm ahead of the layer is computed by every block for itself, in the registers that hold x, where a
// block has all inputs: it costs less than a kernel of its own takes to start and end.
#include <algorithm>

#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/rows_product.cuh"
#include "kernels/cuda/device/rows_stream.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/ops/linear.h"

namespace kernels::cuda {

namespace {

__device__ __forceinline__ float gelu_of(float x) {
  const float twice_u = 1.5957691216057308f * x * (1 + 0.044715f * x * x);
  return x / (1 + expf(-twice_u));
}

// This thread's share of the outputs of a block's panels, which are dealt out to the threads of all blocks of
// a cluster, and what is added to the sums there: fetched ahead of them.
// Behind a norm a cluster is one block, and there is no residual.
template <typename T, int kColumns, int kSide, bool kNorm>
struct Outputs {
  static constexpr int kPanelElements = kColumns * 8 * kPanel, kElements = kSide * kPanelElements;
  static constexpr int kCount = std::max(kElements / kThreads, 1);
  T bias[kCount], residual[kCount];

  static __device__ __forceinline__ int blocks() { return kNorm ? 1 : static_cast<int>(cluster_size()); }
  static __device__ __forceinline__ int rank() { return kNorm ? 0 : static_cast<int>(cluster_rank()); }
  static __device__ __forceinline__ int element(int i) {
    return rank() + (static_cast<int>(threadIdx.x) + i * kThreads) * blocks();
  }
  // The row and the column of y.
  struct Place {
    int n, m;
    bool inside;
    __device__ Place(const RowsCall& a, int panel, int element)
        : n(first_row() + element % kPanelElements / kPanel),
          m((panel + element / kPanelElements) * kPanel + element % kPanel),
          inside(element < kElements && n < a.rows && m < a.out) {}
  };

  __device__ __forceinline__ void load_bias(const RowsCall& a, int panel) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Place at(a, panel, element(i));
      bias[i] = a.bias && at.inside ? static_cast<const T*>(a.bias)[at.m] : T(0.0f);
    }
  }
  __device__ __forceinline__ void load_residual(const RowsCall& a, int panel) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Place at(a, panel, element(i));
      residual[i] = a.residual && at.inside
                        ? static_cast<const T*>(a.residual)[at.n * a.residual_stride + at.m]
                        : T(0.0f);
    }
  }
  __device__ __forceinline__ void write(const RowsCall& a, int panel, int i, float sum) const {
    const Place at(a, panel, element(i));
    if (!at.inside) return;
    sum += to_float(bias[i]);
    if (a.gelu) sum = gelu_of(sum);
    if constexpr (!kNorm) sum += to_float(residual[i]);
    store_output<T>(a, at.n, at.m, sum);
  }
};

template <int kColumns>
using WarpSums = float[kWarps][kColumns * 8 * kPitch];

// Adds the warps' sums, then the blocks', and writes the outputs of the block's panels, of which `panel` is
// the first.
template <int kColumns, class Shares>
__device__ __forceinline__ void finish(const RowsCall& a, int panel, const Shares& outputs,
                                       const WarpSums<kColumns>* partial, float* block_sum) {
  const int blocks = outputs.blocks();
  const auto sum_of_warps = [&](int e) {
    const auto& sums = partial[e / Shares::kPanelElements];
    const int place = e % Shares::kPanelElements / kPanel * kPitch + e % kPanel;
    float sum = sums[0][place];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += sums[w][place];
    return sum;
  };
  if (blocks > 1) {
#pragma unroll
    for (int e = threadIdx.x; e < Shares::kElements; e += kThreads) block_sum[e] = sum_of_warps(e);
    cluster_sync_shared();
  }
#pragma unroll
  for (int i = 0; i < Shares::kCount; ++i) {
    const int e = outputs.element(i);
    if (e >= Shares::kElements) continue;
    float sum = blocks == 1 ? sum_of_warps(e) : 0;
    if (blocks > 1)
#pragma unroll 4
      for (int r = 0; r < blocks; ++r) sum += cluster_shared(block_sum, r)[e];
    outputs.write(a, panel, i, sum);
  }
  // Before the sums are overwritten, and before a block leaves while others read them.
  if (blocks > 1)
    cluster_sync_shared();
  else
    __syncthreads();
}

// Blocks of a multiprocessor: as many as registers leave room for.
template <int kColumns, Input kInput>
inline constexpr int kResident = kColumns == 1 && kInput != Input::norm ? 3 : 2;

// A block has kSide panels at a time, against at most kColumns * 8 rows of x: it reads (and normalises) them
// once for all its panels.
template <typename T, int kColumns, int kSide, Input kInput>
__global__ void __launch_bounds__(kThreads, kResident<kColumns, kInput>) rows_kernel(const RowsCall a) {
  constexpr bool kNorm = kInput == Input::norm;
  using Share = Outputs<T, kColumns, kSide, kNorm>;
  __shared__ WarpSums<kColumns> partial[kSide];
  __shared__ alignas(8) float block_sum[Share::kElements];  // or what a norm exchanges
  __shared__ uint4 norm[2][kNorm ? kNormVectors : 1];
  Share outputs;
  const int blocks = outputs.blocks(), rank = outputs.rank(), slices = kNorm ? 1 : a.slices;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int step = static_cast<int>(gridDim.x) / blocks * kSide;
  const Slice first = kNorm ? Slice{0, a.tiles} : slice_of(a, rank);
  int panel = static_cast<int>(blockIdx.x) / blocks * kSide, loaded = -1;
  WarpProduct<T, kColumns, kSide, kInput != Input::elements> product;
  let_next_start();
  product.fetch(a, panel, first, warp, lane);
  NormShares shares;
  if constexpr (kNorm) {
    fetch_norm<T>(a, norm);
    shares.compute(a, warp, lane);
  }
  outputs.load_bias(a, panel);
  wait_for_previous();
  for (; panel < a.panels; panel += step) {
    if constexpr (!kNorm) outputs.load_residual(a, panel);
    for (int s = rank; s < slices; s += blocks) {
      const Slice slice = s == rank ? first : slice_of(a, s);
      if (loaded != s) {
        product.load_x(a, slice, warp, lane);
        if constexpr (kNorm)
          product.normalise(a, shares, warp, lane, reinterpret_cast<float2(*)[kColumns * 8]>(block_sum),
                            norm);
      }
      loaded = s;
      if (s == rank) product.clear();
      product.multiply(a, slice, warp);
      // In flight while these panels are finished.
      if (s + blocks < slices)
        product.fetch(a, panel, slice_of(a, s + blocks), warp, lane);
      else if (panel + step < a.panels)
        product.fetch(a, panel + step, first, warp, lane);
    }
#pragma unroll
    for (int p = 0; p < kSide; ++p) product.store(p, partial[p][warp], lane);
    __syncthreads();
    finish<kColumns>(a, panel, outputs, partial, block_sum);
    outputs.load_bias(a, panel + step);
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

template <typename T, int kColumns, int kSide, Input kInput>
void launch_rows(const Context& ctx, const RowsCall& a, int cluster, int groups, int places) {
  const int across = std::min(places, (a.panels + kSide - 1) / kSide);
  launch(ctx, "linear",
         {.grid = dim3(static_cast<unsigned>(across * cluster), static_cast<unsigned>(groups)),
          .block = dim3(kThreads),
          .cluster = static_cast<unsigned>(cluster),
          .dependent = true},
         rows_kernel<T, kColumns, kSide, kInput>, a);
}

// One panel a block where all panels find a place at once, otherwise two.
template <typename T, int kColumns, Input kInput>
void run(const Context& ctx, const RowsCall& a) {
  const int cluster = has_clusters() ? std::min(a.slices, kMostCluster) : 1;
  const int groups = (a.rows + kGroup - 1) / kGroup;
  const int places = std::max(multiprocessors() * kResident<kColumns, kInput> / cluster / groups, 1);
  if constexpr (sizeof(T) == 2 && kColumns == 2)
    if (a.panels > places) return launch_rows<T, kColumns, 2, kInput>(ctx, a, cluster, groups, places);
  launch_rows<T, kColumns, 1, kInput>(ctx, a, cluster, groups, places);
}

template <typename T, Input kInput>
void run_columns(const Context& ctx, const RowsCall& a) {
  if (a.rows <= 8) return run<T, 1, kInput>(ctx, a);
  run<T, 2, kInput>(ctx, a);
}

template <typename T, int kColumns>
void launch_stream(const Context& ctx, const RowsCall& a) {
  const auto kernel = stream_kernel<T, kColumns>;
  const unsigned shared = stream_shared(a.tiles, kColumns);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        "linear");
  const int groups = (a.rows + kColumns * 8 - 1) / (kColumns * 8);
  const int across = std::clamp(multiprocessors() / groups, 1, a.panels);
  launch(ctx, "linear",
         {.grid = dim3(static_cast<unsigned>(across), static_cast<unsigned>(groups)),
          .block = dim3(kThreads),
          .dependent = true,
          .shared = shared},
         kernel, a);
}

// False where the other form has to do it.
template <typename T>
bool run_stream(const Context& ctx, const RowsCall& a) {
  constexpr int kMany = 4;  // panels of a multiprocessor
  if (a.rows <= kGroup || a.panels <= kMany * multiprocessors() || a.gelu || a.residual) return false;
  if (a.slices > (has_clusters() ? kMostCluster : 1)) return false;
  const auto most = static_cast<unsigned>(shared_memory_limit());
  if (a.rows > 32 && stream_shared(a.tiles, 8) <= most)
    launch_stream<T, 8>(ctx, a);
  else if (stream_shared(a.tiles, 4) <= most)
    launch_stream<T, 4>(ctx, a);
  else
    return false;
  return true;
}

template <typename T>
void run_rows(const Context& ctx, const RowsCall& a, bool vectors) {
  if constexpr (sizeof(T) == 2) {
    if (a.gain) return run_columns<T, Input::norm>(ctx, a);
    if (vectors && run_stream<T>(ctx, a)) return;
  }
  if (!vectors) return run<T, 2, Input::elements>(ctx, a);
  run_columns<T, Input::vectors>(ctx, a);
}

// Rows that consist of whole 16 bytes, aligned. Others are rare, and need not be fast.
bool has_vectors(const Tensor& x) {
  const auto bytes = static_cast<int64_t>(size_of(x.dtype));
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.row_stride * bytes % 16 == 0 &&
         x.cols() * bytes % 16 == 0;
}
bool is_aligned(const Tensor& vector) { return reinterpret_cast<uintptr_t>(vector.data) % 16 == 0; }

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

bool linear_rows_norms(const Tensor& x, const LinearWeight& w) {
  return w.panels && x.rows() <= kMaxDecodeRows && x.dtype != DType::f32 && w.panels.dim(1) <= kSliceTiles &&
         w.norm.params.groups == 1 && has_vectors(x) && is_aligned(w.norm.gain) && is_aligned(w.norm.bias);
}

void linear_rows(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor y, bool gelu,
                 const Tensor& residual) {
  if (x.rows() == 0) return;
  const int tiles = static_cast<int>(w.panels.dim(1));
  const RowsCall a{.weights = w.panels.data,
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
                   .y_fp32 = y.dtype == DType::f32,
                   .gain = w.norm.gain.data,
                   .shift = w.norm.bias.data,
                   .layer = w.norm.params.kind == NormKind::layer,
                   .eps = w.norm.params.eps,
                   .share = 1.0f / static_cast<float>(x.cols())};
  const bool vectors = has_vectors(x);
  visit_device_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    run_rows<T>(ctx, a, vectors);
  });
}

}  // namespace kernels::cuda

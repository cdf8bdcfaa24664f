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
// A norm ahead of the layer is computed by every block for itself, where a block has all inputs
// (rows_norm.cuh): it costs less than a kernel of its own takes to start and end.
//
// Kernels of a decoding step follow one another closely and start early. So that the weights of the next one
// arrive while this one works, both must find room: beyond 8 rows a kernel has one block for a multiprocessor
// and takes half of its registers and about half of its shared memory.
#include <algorithm>

#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/rows_exchange.cuh"
#include "kernels/cuda/device/rows_norm.cuh"
#include "kernels/cuda/device/rows_product.cuh"
#include "kernels/cuda/device/rows_stream.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/ops/linear.h"

namespace kernels::cuda {

namespace {

template <typename T>
__device__ __forceinline__ float gelu_of(float x) {
  const float twice_u = 1.5957691216057308f * x * (1 + 0.044715f * x * x);
  if constexpr (sizeof(T) == 2) return __fdividef(x, 1 + __expf(-twice_u));
  return x / (1 + expf(-twice_u));
}

// This thread's share of the outputs of a block's panels, which are dealt out to the warps of all blocks of a
// cluster in lines of 32, and what is added to the sums there: fetched ahead of them.
// kWhole: a block has all inputs, and a cluster is one block. Behind a norm it is, and there is no residual.
template <typename T, int kColumns, int kSide, bool kWhole, bool kNorm>
struct Outputs {
  static constexpr unsigned kPanelElements = kColumns * 8 * kPanel, kElements = kSide * kPanelElements;
  static constexpr int kLines = kElements / 32;
  static constexpr int kCount = std::max(kLines / kWarps, 1);

  const LineShare share;
  __device__ __forceinline__ explicit Outputs(const RowsCall& a)
      : share(kWhole ? LineShare{1, 0, 1u << 16}
                     : LineShare{a.blocks, static_cast<int>(cluster_rank()), a.inverse}) {}
  // Line i of this warp is its block's own one number own(i).
  static __device__ __forceinline__ int own(int i) { return static_cast<int>(threadIdx.x) / 32 + i * kWarps; }
  static __device__ __forceinline__ bool is_line(int own) { return kLines % kWarps == 0 || own < kLines; }
  __device__ __forceinline__ unsigned element(int i) const {
    return static_cast<unsigned>(share.line(own(i))) * 32 + threadIdx.x % 32;
  }
  // Of an element: its row among the block's, its output among the panels'.
  __device__ __forceinline__ int row(int i) const {
    return static_cast<int>(element(i) % kPanelElements / kPanel);
  }
  __device__ __forceinline__ int output(int i) const {
    return static_cast<int>(element(i) / kPanelElements * kPanel + element(i) % kPanel);
  }

  // Takes the outputs of the panels from `panel` on. Addresses are computed here, and not where they are
  // used.
  __device__ __forceinline__ void aim(const RowsCall& a, int panel) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int n = first_row() + row(i), m = panel * kPanel + output(i);
      const bool inside = element(i) < kElements && n < a.rows && m < a.out;
      to_[i] = inside ? static_cast<char*>(a.y) + (n * a.y_stride + m) * (a.y_fp32 ? 4 : sizeof(T)) : nullptr;
      keep_global(to_[i]);
      if constexpr (kNorm) {
        sums_[i] = inside ? a.sums[m] : float2{};
        continue;
      }
      bias_[i] = a.bias && inside ? static_cast<const T*>(a.bias)[m] : T(0.0f);
      from_[i] =
          a.residual && inside ? static_cast<const T*>(a.residual) + n * a.residual_stride + m : nullptr;
      keep_global(from_[i]);
    }
  }
  __device__ __forceinline__ void load_residual() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) residual_[i] = from_[i] ? *from_[i] : T(0.0f);
  }
  // Behind a norm: W gain, and W shift and the bias, of the output.
  __device__ __forceinline__ float2 sums(int i) const { return sums_[i]; }
  // All at once, so that one need not wait for another.
  __device__ __forceinline__ void write(const RowsCall& a, float (&sum)[kCount]) const {
    if constexpr (!kNorm)
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += to_float(bias_[i]);
    if (a.gelu)
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] = gelu_of<T>(sum[i]);
    if constexpr (!kNorm)
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += to_float(residual_[i]);
    if (a.y_fp32)
#pragma unroll
      for (int i = 0; i < kCount; ++i) store(to_[i], sum[i]);
    else
#pragma unroll
      for (int i = 0; i < kCount; ++i) store(to_[i], from_float<T>(sum[i]));
  }

 private:
  template <typename Y>
  static __device__ __forceinline__ void store(char* to, Y y) {
    __builtin_assume(__isGlobal(to));
    if (to) *reinterpret_cast<Y*>(to) = y;
  }

  T bias_[kCount], residual_[kCount];
  float2 sums_[kCount];
  const T* from_[kCount];
  char* to_[kCount];
};

template <int kColumns>
using WarpSums = float[kWarps][kColumns * 8 * kPitch];

// A block has x there until its lanes have got it, then their sums.
template <int kColumns, int kSide>
union BlockRows {
  SharedX<kColumns> x;
  WarpSums<kColumns> partial[kSide];
};

// Adds the warps' sums, then the blocks', and writes the outputs of the block's panels.
template <int kColumns, class Share>
class Ending {
 public:
  using Blocks = Exchange<Share::kLines, kMostCluster>;
  // Ahead of waiting.
  __device__ __forceinline__ Ending(const WarpSums<kColumns>* partial, Blocks& blocks, const Share& outputs)
      : partial_(partial), blocks_(blocks), outputs_(outputs) {
    const LineShare& share = outputs.share;
    if (share.blocks == 1) return;
    blocks_.start(share);
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) way_[i] = blocks_.way(share, Share::own(i));
  }
  // round: of the block's panels. of(i, sum): what is written for the sum of this thread's element i.
  template <class Of>
  __device__ __forceinline__ void operator()(const RowsCall& a, int round, Of&& of) {
    const LineShare& share = outputs_.share;
    float sum[Share::kCount] = {};
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i)
      if (Share::is_line(Share::own(i)))
        sum[i] = sum_of_warps(static_cast<unsigned>(Share::own(i)) * 32 + threadIdx.x % 32);
    if (share.blocks > 1) {
#pragma unroll
      for (int i = 0; i < Share::kCount; ++i)
        if (Share::is_line(Share::own(i))) Blocks::send(way_[i], sum[i]);
      blocks_.wait(round);
#pragma unroll
      for (int i = 0; i < Share::kCount; ++i)
        if (share.line(Share::own(i)) < Share::kLines) sum[i] = blocks_.sum(share, Share::own(i));
    }
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i)
      if (Share::is_line(Share::own(i))) sum[i] = of(i, sum[i]);
    outputs_.write(a, sum);
  }
  // Until the next round may begin.
  __device__ __forceinline__ void next_round() {
    const LineShare& share = outputs_.share;
    if (share.blocks == 1) return __syncthreads();
    cluster_sync_shared();
    // Not ahead of that: nothing else keeps the next phase of a block that writes no line from ending while
    // some of its warps still wait for this one.
    if (threadIdx.x == 0) blocks_.expect(share);
  }

 private:
  __device__ __forceinline__ float sum_of_warps(unsigned e) const {
    const auto& sums = partial_[e / Share::kPanelElements];
    const unsigned place = e % Share::kPanelElements / kPanel * kPitch + e % kPanel;
    float sum = sums[0][place];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += sums[w][place];
    return sum;
  }
  const WarpSums<kColumns>* partial_;
  Blocks& blocks_;
  const Share& outputs_;
  typename Blocks::Way way_[Share::kCount];
};

// Blocks of a multiprocessor: as many as registers leave room for.
template <int kColumns, Input kInput>
inline constexpr int kResident = kColumns == 1 && kInput != Input::norm ? 3 : 2;

// A block has kSide panels at a time, against at most kColumns * 8 rows of x: it reads (and normalises) them
// once for all its panels. What does not need the kernel ahead is done before waiting for it; then x is the
// first to be asked for.
// kOnce: it has one slice, and panels once.
template <typename T, int kColumns, int kSide, Input kInput, bool kWhole, bool kOnce>
__global__ void __launch_bounds__(kThreads, kResident<kColumns, kInput>) rows_kernel(const RowsCall a) {
  using Share = Outputs<T, kColumns, kSide, kWhole, false>;
  using End = Ending<kColumns, Share>;
  using Product = WarpProduct<T, kColumns, kSide, kInput != Input::elements>;
  using Way = typename Product::Way;
  extern __shared__ uint4 shared_vectors[];
  __shared__ BlockRows<kColumns, kSide> rows;
  __shared__ typename End::Blocks from_blocks;
  Share outputs(a);
  const int blocks = outputs.share.blocks, rank = outputs.share.rank, slices = kWhole ? 1 : a.slices;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int step = static_cast<int>(gridDim.x) / blocks * kSide;
  const Slice first = kWhole ? Slice{0, a.tiles} : slice_of(a, rank);
  int panel = static_cast<int>(blockIdx.x) / blocks * kSide, loaded = rank;
  Product product(shared_vectors);
  let_next_start();
  product.fetch(a, panel, first, warp, lane);
  outputs.aim(a, panel);
  End end(rows.partial, from_blocks, outputs);
  Way way(a, first, warp, lane);
  way.keep();
  if constexpr (kSide > 1) __syncthreads();
  wait_for_previous();
  product.load_x(a, way, first, warp, lane);
  outputs.load_residual();
  product.exchange_x(warp, lane, rows.x);
  if constexpr (Product::kLines) __syncthreads();
  for (int round = 0;; ++round) {
    product.clear();
    for (int s = rank; kOnce || s < slices; s += blocks) {
      const Slice slice = s == rank ? first : slice_of(a, s);
      if (loaded != s) {
        product.load_x(a, Way(a, slice, warp, lane), slice, warp, lane);
        product.exchange_x(warp, lane, rows.x);
        if constexpr (Product::kLines) __syncthreads();
      }
      loaded = s;
      product.multiply(a, slice, warp);
      if (kOnce || s + blocks >= slices) break;
      if constexpr (kSide > 1) __syncthreads();
      product.fetch(a, panel, slice_of(a, s + blocks), warp, lane);
    }
    // In flight while these panels are finished.
    if (!kOnce && kSide == 1 && panel + step < a.panels) product.fetch(a, panel + step, first, warp, lane);
#pragma unroll
    for (int p = 0; p < kSide; ++p) product.store(p, rows.partial[p][warp], lane);
    __syncthreads();
    if (!kOnce && kSide > 1 && panel + step < a.panels) product.fetch(a, panel + step, first, warp, lane);
    end(a, round, [](int, float sum) { return sum; });
    panel += step;
    if (kOnce || panel >= a.panels) break;
    outputs.aim(a, panel);
    outputs.load_residual();
    end.next_round();
  }
}

// The same of a norm of x. A block has all inputs.
template <typename T, int kColumns, int kSide, bool kOnce>
__global__ void __launch_bounds__(kThreads, 2) norm_rows_kernel(const RowsCall a) {
  using Share = Outputs<T, kColumns, kSide, true, true>;
  using End = Ending<kColumns, Share>;
  using Norm = RowsNorm<T, kColumns, kSide>;
  extern __shared__ uint4 shared_vectors[];
  __shared__ BlockRows<kColumns, kSide> rows;
  __shared__ typename End::Blocks from_blocks;
  __shared__ typename Norm::Shared shared;
  Share outputs(a);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int step = static_cast<int>(gridDim.x) * kSide;
  const Slice all{0, a.tiles};
  int panel = static_cast<int>(blockIdx.x) * kSide;
  typename Norm::Product product(shared_vectors);
  let_next_start();
  product.fetch(a, panel, all, warp, lane);
  const Norm norm(a, warp, lane, shared);
  outputs.aim(a, panel);
  End end(rows.partial, from_blocks, outputs);
  typename Norm::Product::Way way(a, all, warp, lane);
  way.keep();
  wait_for_previous();
  product.load_x(a, way, all, warp, lane);
  product.exchange_x(warp, lane, rows.x);
  norm(a, product, way.tiles, warp, lane, shared);
  for (int round = 0;; ++round) {
    product.clear();
    product.multiply(a, all, warp);
    if (!kOnce && kSide == 1 && panel + step < a.panels) product.fetch(a, panel + step, all, warp, lane);
#pragma unroll
    for (int p = 0; p < kSide; ++p) product.store(p, rows.partial[p][warp], lane);
    __syncthreads();
    if (!kOnce && kSide > 1 && panel + step < a.panels) product.fetch(a, panel + step, all, warp, lane);
    end(a, round, [&](int i, float sum) { return shared.normed(outputs.row(i), outputs.sums(i), sum); });
    panel += step;
    if (kOnce || panel >= a.panels) break;
    outputs.aim(a, panel);
    end.next_round();
  }
}

// What every call of a product is launched with: blocks of a cluster, groups of rows.
struct RowsGrid {
  int cluster, groups;
  // Clusters of a group where the multiprocessors hold so many blocks each.
  int places(int resident) const { return std::max(multiprocessors() * resident / cluster / groups, 1); }
};

// Dynamic shared memory with which a multiprocessor has room for at most so many of a kernel's blocks. Blocks
// that start early would otherwise stand together where the kernel ahead has none, and take longest there;
// and one of every other kernel of a step still finds room.
template <typename... Parameters>
unsigned crowd_shared(void (*kernel)(Parameters...), int most) {
  constexpr int kGrain = 128;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "linear");
  const int too_much = (shared_memory_limit() + kReservedShared) / (most + 1) - kReservedShared + kGrain;
  return static_cast<unsigned>(std::max(too_much - static_cast<int>(attributes.sharedSizeBytes), 0));
}

// The most blocks of a kernel that are to stand on a multiprocessor; 0: as many as find room. Behind a norm
// one; smaller ones, two.
template <int kColumns, int kSide, Input kInput>
constexpr int kCrowd = kColumns == 1 || kInput == Input::elements ? 0
                       : kSide == 1                               ? 2
                       : kInput == Input::norm                    ? 1
                                                                  : 0;

// Up to 8 rows a step is one wait behind another, and code without loops is shorter on its way; beyond, it
// waits for weights and x and gains nothing by it.
template <typename T, int kColumns, int kSide, Input kInput, bool kOnce>
auto kernel_of(const RowsCall& a) {
  if constexpr (kInput == Input::norm)
    return norm_rows_kernel<T, kColumns, kSide, kOnce>;
  else if constexpr (sizeof(T) == 2 && kInput == Input::vectors)
    return a.slices == 1 ? rows_kernel<T, kColumns, kSide, kInput, true, kOnce>
                         : rows_kernel<T, kColumns, kSide, kInput, false, kOnce>;
  else
    return rows_kernel<T, kColumns, kSide, kInput, false, false>;
}

template <typename T, int kColumns, int kSide, Input kInput>
void launch_rows(const Context& ctx, const RowsCall& a, RowsGrid grid, int places) {
  const int across = std::min(places, (a.panels + kSide - 1) / kSide);
  const bool once = across * kSide >= a.panels && a.slices <= grid.cluster;
  const auto kernel = kColumns == 1 && once ? kernel_of<T, kColumns, kSide, kInput, kColumns == 1>(a)
                                            : kernel_of<T, kColumns, kSide, kInput, false>(a);
  constexpr int kMost = kCrowd<kColumns, kSide, kInput>;
  unsigned shared = BlockWeights<T, kSide>::kSharedBytes;
  if (sizeof(T) == 2 && kMost > 0 && grid.groups <= 2) shared = std::max(shared, crowd_shared(kernel, kMost));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        "linear");
  launch(ctx, "linear",
         {.grid = dim3(static_cast<unsigned>(across * grid.cluster), static_cast<unsigned>(grid.groups)),
          .block = dim3(kThreads),
          .cluster = static_cast<unsigned>(grid.cluster),
          .dependent = true,
          .shared = shared},
         kernel, a);
}

// Bytes of shared memory that a block with three panels may take.
constexpr int kThreePanels = 112 * 1024;

// Beyond 8 rows: as few panels a block as leave the next kernel's blocks half of every multiprocessor, where
// its weights arrive while this one works. Rows beyond 32 need all of it.
template <typename T, Input kInput>
void run_sides(const Context& ctx, const RowsCall& a, RowsGrid grid) {
  const int places = grid.places(grid.groups <= 2 ? 1 : 2);
  if (a.panels <= places) return launch_rows<T, 2, 1, kInput>(ctx, a, grid, places);
  if (a.panels <= places * 2 || shared_memory_limit() < kThreePanels)
    return launch_rows<T, 2, 2, kInput>(ctx, a, grid, places);
  launch_rows<T, 2, 3, kInput>(ctx, a, grid, places);
}

template <typename T, int kColumns, Input kInput>
void run(const Context& ctx, const RowsCall& a) {
  const RowsGrid grid{.cluster = a.blocks, .groups = (a.rows + kGroup - 1) / kGroup};
  if constexpr (sizeof(T) == 2 && kColumns == 2 && kInput != Input::elements)
    run_sides<T, kInput>(ctx, a, grid);
  else
    launch_rows<T, kColumns, 1, kInput>(ctx, a, grid, grid.places(kResident<kColumns, kInput>));
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
  if (a.slices > a.blocks) return false;
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

bool linear_rows_norms(const Tensor& x, const LinearWeight& w) {
  return w.panels && w.norm.sums && x.rows() <= kMaxDecodeRows && x.dtype != DType::f32 &&
         w.panels.dim(1) <= kSliceTiles && w.norm.params.groups == 1 && has_vectors(x) &&
         is_aligned(w.norm.gain);
}

void linear_rows(const Context& ctx, const Tensor& x, const LinearWeight& w, Tensor y, bool gelu,
                 const Tensor& residual) {
  if (x.rows() == 0) return;
  const int tiles = static_cast<int>(w.panels.dim(1)), slices = (tiles + kSliceTiles - 1) / kSliceTiles;
  const int blocks = has_clusters() ? std::min(slices, kMostCluster) : 1;
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
                   .slices = slices,
                   .slice_tiles = (tiles + slices - 1) / slices,
                   .blocks = blocks,
                   .inverse = (65536u + static_cast<unsigned>(blocks) - 1) / static_cast<unsigned>(blocks),
                   .gelu = gelu,
                   .y_fp32 = y.dtype == DType::f32,
                   .gain = w.norm.gain.data,
                   .sums = static_cast<const float2*>(w.norm.sums.data),
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

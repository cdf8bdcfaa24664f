// One cluster of blocks reads a row of logits, so that a single row keeps many multiprocessors busy. How a
// row is shared out depends on its length alone, never on the number of rows.
#include <algorithm>
#include <limits>

#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/ops/sampling.h"

namespace kernels::cuda {

namespace {

constexpr int kWarps = 16, kThreads = kWarps * 32;
constexpr unsigned kCluster = 8;
constexpr int64_t kWideRow = 4096;  // shorter rows take one block
// Of argmax: two blocks find room beside one of the kernel that makes the logits, and a cluster fetches the
// rows of usual vocabularies at once.
constexpr int kSearchWarps = 8, kSearchThreads = kSearchWarps * 32, kSearchAhead = 25;

template <typename T>
struct Logits {
  const T* data;
  int64_t stride;
  int columns;
};

// Where this thread's block stands in its row: elements first, first + step, ... are this thread's.
struct Share {
  int64_t row;
  int rank, blocks, first, step;
  __device__ Share() : rank(static_cast<int>(cluster_rank())), blocks(static_cast<int>(cluster_size())) {
    row = blockIdx.x / blocks;
    first = rank * kThreads + static_cast<int>(threadIdx.x);
    step = blocks * kThreads;
  }
};

// Larger keys are larger logits, or equal ones of a smaller index; 0 is less than every key. Keys differ.
using Key = unsigned long long;

__device__ __forceinline__ Key key_of(uint32_t order, int index) {
  return static_cast<Key>(order) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}
__device__ __forceinline__ int index_of(Key key) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(key));
}
// Unsigned integers in the order of the numbers; -0 and 0 are one.
__device__ __forceinline__ uint32_t order_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ Key warp_largest(Key key) {
  const auto order = static_cast<uint32_t>(key >> 32);
  const uint32_t top = __reduce_max_sync(0xffffffffu, order);
  const uint32_t low = __reduce_max_sync(0xffffffffu, order == top ? static_cast<uint32_t>(key) : 0);
  return static_cast<Key>(top) << 32 | low;
}

// The largest key among elements first, first + kSearchThreads, ... of a thread's share. Not a number is less
// than everything, and so is what lies beyond the row.
template <typename T>
__device__ __forceinline__ Key largest_of_share(const T* x, int first, int columns) {
  float values[kSearchAhead];
#pragma unroll
  for (int j = 0; j < kSearchAhead; ++j) {
    values[j] = std::numeric_limits<float>::quiet_NaN();
    if (j * kSearchThreads < columns - first) values[j] = to_float(x[first + j * kSearchThreads]);
  }
  float top = values[0];
#pragma unroll
  for (int j = 1; j < kSearchAhead; ++j) top = fmaxf(top, values[j]);
  int index = first;
#pragma unroll
  for (int j = kSearchAhead - 1; j >= 0; --j)
    if (values[j] == top) index = first + j * kSearchThreads;
  return key_of(isnan(top) ? 0 : order_of(top), index);
}

template <typename T>
__global__ void __launch_bounds__(kSearchThreads, 4) argmax_kernel(const Logits<T> logits, int32_t* tokens) {
  constexpr int kShare = kSearchAhead * kSearchThreads;
  __shared__ Key of_warp[kSearchWarps];
  const int rank = static_cast<int>(cluster_rank()), blocks = static_cast<int>(cluster_size());
  const int64_t row = blockIdx.x / static_cast<unsigned>(blocks);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* x = logits.data + row * logits.stride;
  let_next_start();
  wait_for_previous();
  Key best = 0;
#pragma unroll 1
  for (int first = rank * kShare + static_cast<int>(threadIdx.x); first < logits.columns;
       first += blocks * kShare)
    best = max(best, largest_of_share(x, first, logits.columns));
  best = warp_largest(best);
  if (lane == 0) of_warp[warp] = best;
  cluster_sync_shared();
  if (rank == 0 && warp == 0) {
    best = 0;
#pragma unroll
    for (int i = lane; i < static_cast<int>(kCluster) * kSearchWarps; i += 32)
      if (i < blocks * kSearchWarps)
        best =
            max(best, *cluster_shared(of_warp + i % kSearchWarps, static_cast<uint32_t>(i / kSearchWarps)));
    best = warp_largest(best);
    if (lane == 0) tokens[row] = index_of(best);
  }
  cluster_leave();  // no block leaves while its results are read
}

// The same value in every thread of the cluster: blocks in the order of their ranks.
template <typename Op>
__device__ float cluster_reduce(float x, float* reduction, float* of_block, const Share& share,
                                float identity) {
  Op op;
  x = block_reduce<Op, float>(x, reduction, identity);
  if (threadIdx.x == 0) *of_block = x;
  cluster_sync();
  float all = *cluster_shared(of_block, 0);
  for (int r = 1; r < share.blocks; ++r) all = op(all, *cluster_shared(of_block, r));
  cluster_sync();
  return all;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    probabilities_kernel(const Logits<T> logits, float scale, float* p, int64_t p_stride) {
  __shared__ float reduction[33], of_block;
  const Share share;
  let_next_start();
  wait_for_previous();
  const T* x = logits.data + share.row * logits.stride;
  float* out = p + share.row * p_stride;
  float largest = -std::numeric_limits<float>::infinity();
#pragma unroll 8
  for (int i = share.first; i < logits.columns; i += share.step) largest = fmaxf(largest, to_float(x[i]));
  largest =
      cluster_reduce<Max>(largest, reduction, &of_block, share, -std::numeric_limits<float>::infinity());
  float sum = 0;
#pragma unroll 8
  for (int i = share.first; i < logits.columns; i += share.step)
    sum += expf((to_float(x[i]) - largest) * scale);
  sum = cluster_reduce<Sum>(sum, reduction, &of_block, share, 0);
  const float inverse = 1 / sum;
#pragma unroll 8
  for (int i = share.first; i < logits.columns; i += share.step)
    out[i] = expf((to_float(x[i]) - largest) * scale) * inverse;
}

// The largest key below `bound` among this thread's elements; NaN counts as -infinity.
template <typename T>
__device__ __forceinline__ Key largest_below(Key bound, const T* x, int columns, const Share& share) {
  Key best = 0;
#pragma unroll 4
  for (int i = share.first; i < columns; i += share.step) {
    float value = to_float(x[i]);
    if (isnan(value)) value = -std::numeric_limits<float>::infinity();
    const Key key = key_of(order_of(value), i);
    if (key < bound) best = max(best, key);
  }
  return best;
}

// One warp merges sorted lists, one to a lane (nullptr: none), into the `count` largest keys.
__device__ __forceinline__ void merge(const Key* list, int count, Key* merged) {
  int place = 0;
  Key head = list ? list[0] : 0;
  for (int j = 0; j < count; ++j) {
    const Key best = warp_reduce<Max>(head);
    if (threadIdx.x % 32 == 0) merged[j] = best;
    if (head == best && best != 0) head = ++place < count ? list[place] : 0;
  }
}

// The lists are found 32 at a time: every warp finds its own, then warps are merged, then blocks.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    top_k_kernel(const Logits<T> logits, int k, int32_t* indices, int64_t indices_stride) {
  constexpr int kRound = 32;
  __shared__ Key of_warp[kWarps][kRound], of_block[kRound], of_row[kRound];
  const Share share;
  let_next_start();
  wait_for_previous();
  const T* x = logits.data + share.row * logits.stride;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Key bound = std::numeric_limits<Key>::max();
  for (int first = 0; first < k; first += kRound) {
    const int count = min(kRound, k - first);
    Key mine = largest_below(bound, x, logits.columns, share);
    for (int j = 0; j < count; ++j) {
      const Key best = warp_reduce<Max>(mine);
      if (lane == 0) of_warp[warp][j] = best;
      if (mine == best && best != 0) mine = largest_below(best, x, logits.columns, share);
    }
    __syncthreads();
    if (warp == 0) merge(lane < kWarps ? of_warp[lane] : nullptr, count, of_block);
    cluster_sync();
    if (warp == 0)
      merge(lane < share.blocks ? cluster_shared(of_block, static_cast<uint32_t>(lane)) : nullptr, count,
            of_row);
    cluster_sync();
    if (share.rank == 0 && static_cast<int>(threadIdx.x) < count)
      indices[share.row * indices_stride + first + static_cast<int>(threadIdx.x)] =
          index_of(of_row[threadIdx.x]);
    bound = of_row[count - 1];
    __syncthreads();
  }
}

// fn(logits, shape): one cluster to a row, of blocks of so many threads.
template <typename Fn>
void over_rows(const Tensor& logits, int threads, Fn&& fn) {
  if (logits.rows() == 0) return;
  const unsigned cluster = logits.cols() >= kWideRow && has_clusters() ? kCluster : 1;
  const LaunchShape shape{.grid = dim3(static_cast<unsigned>(logits.rows()) * cluster),
                          .block = dim3(static_cast<unsigned>(threads)),
                          .cluster = cluster,
                          .dependent = true};
  visit_device_dtype(logits.dtype, [&](auto tag) {
    using T = decltype(tag);
    fn(Logits<T>{static_cast<const T*>(logits.data), logits.row_stride, static_cast<int>(logits.cols())},
       shape);
  });
}

}  // namespace

void argmax(const Context& ctx, const Tensor& logits, Tensor tokens) {
  over_rows(logits, kSearchThreads, [&]<typename T>(const Logits<T>& x, const LaunchShape& shape) {
    launch(ctx, "argmax", shape, argmax_kernel<T>, x, tokens.as<int32_t>());
  });
}

void probabilities(const Context& ctx, const Tensor& logits, float temperature, Tensor p) {
  over_rows(logits, kThreads, [&]<typename T>(const Logits<T>& x, const LaunchShape& shape) {
    launch(ctx, "probabilities", shape, probabilities_kernel<T>, x, 1 / temperature, p.as<float>(),
           p.row_stride);
  });
}

void top_k(const Context& ctx, const Tensor& logits, Tensor indices) {
  if (indices.cols() == 0) return;
  over_rows(logits, kThreads, [&]<typename T>(const Logits<T>& x, const LaunchShape& shape) {
    launch(ctx, "top_k", shape, top_k_kernel<T>, x, static_cast<int>(indices.cols()), indices.as<int32_t>(),
           indices.row_stride);
  });
}

}  // namespace kernels::cuda

#pragma once
// How the norm kernels spread groups of rows over threads, their sums, and what the backward has besides: its
// blocks stay and take rows in turn, and the next rows are on their way to shared memory while one is worked
// on.
#include <initializer_list>

#include "kernels/core/tensor.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/device/map.cuh"
#include "kernels/cuda/device/reduce.cuh"

namespace kernels::cuda {

// A group is kept by kLanes_ threads of a warp or, with 0, by as many whole warps as it needs. A thread holds
// up to kVectors_ vectors. blockDim is (threads of a group, rows at a time).
template <int kLanes_, int kVectors_>
struct Spread {
  static constexpr bool kWholeWarps = kLanes_ == 0;
  static constexpr int kVectors = kVectors_, kWarpLanes = kWholeWarps ? 32 : kLanes_;
  // Threads of a group of so many vectors.
  static int lanes(int vectors) {
    return kWholeWarps ? ((vectors + kVectors - 1) / kVectors + 31) / 32 * 32 : kLanes_;
  }
};
// A whole block goes over the row element by element, as often as it must.
struct AnySpread {};
inline constexpr int kAnyThreads = 256;

// Elements of a vector: 16 bytes of the wider type.
template <typename X, typename Y>
inline constexpr int kNormElements = 16 / static_cast<int>(std::max(sizeof(X), sizeof(Y)));

inline constexpr int kMostVectors = 1024;

// Calls fn with the spread for `columns` elements in vectors of `elements`.
template <typename Fn>
void visit_spread(int columns, int elements, bool wide, Fn&& fn) {
  const int vectors = columns / elements;
  if (!wide || vectors > kMostVectors) return fn(AnySpread{});
  if (vectors <= 8 * 2) return fn(Spread<8, 2>{});
  return fn(Spread<0, 3>{});
}

inline constexpr int kMostRowThreads = 192;  // of a block, unless one row needs more
// Order of sums must not depend on the device: blocks are counted for this many multiprocessors anywhere.
inline constexpr int64_t kRowMultiprocessors = 132;

// (threads of a group, rows at a time) of a block. Few rows are spread over all multiprocessors, in whole
// warps.
template <class S>
dim3 row_block(int64_t rows, int vectors) {
  const int lanes = S::lanes(vectors);
  const bool few = rows <= kRowMultiprocessors * 2;
  return dim3(static_cast<unsigned>(lanes),
              static_cast<unsigned>(std::max(1, (few ? 32 : kMostRowThreads) / lanes)));
}

struct RowPlan {
  dim3 grid, block;
  int vectors, bytes, stages;  // of a group; of a row in a stage
  unsigned shared() const { return block.y * static_cast<unsigned>(bytes * stages); }
};

// `bytes`: what a vector takes of a stage. `threads`: of a multiprocessor.
template <class S>
RowPlan plan_rows(int64_t rows, int64_t groups, int vectors, int bytes, int threads) {
  RowPlan plan{};
  plan.block = row_block<S>(rows, vectors);
  const int at_once = static_cast<int>(plan.block.y);
  const int64_t resident = std::max(1, threads / static_cast<int>(plan.block.x * plan.block.y));
  const int64_t blocks =
      std::min(std::max<int64_t>(1, kRowMultiprocessors * resident / groups), (rows + at_once - 1) / at_once);
  plan.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups));
  plan.vectors = vectors;
  plan.bytes = (vectors * bytes + 15) / 16 * 16;
  const int64_t three = int64_t{3} * at_once * plan.bytes;
  plan.stages = three <= 96 * 1024 && three * resident <= 200 * 1024 ? 3 : 2;
  return plan;
}

// A thread's part of the stages. It reads nothing but what it copied itself, so it waits for nobody.
class RowStages {
 public:
  __device__ __forceinline__ RowStages(unsigned char* memory, const RowPlan& plan)
      : begin_(memory + threadIdx.y * plan.bytes),
        fill_(begin_),
        read_(begin_),
        step_(static_cast<int>(blockDim.y) * plan.bytes),
        end_(begin_ + plan.stages * step_),
        three_(plan.stages == 3) {}
  // The stage to copy the next row to; end_copies() follows, whether there is such a row or not.
  __device__ __forceinline__ unsigned char* fill() { return next(fill_); }
  __device__ __forceinline__ void end_copies() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // The oldest row, after plan.stages rows were asked for that have not been read.
  __device__ __forceinline__ const unsigned char* read() {
    if (three_)
      asm volatile("cp.async.wait_group 2;" ::: "memory");
    else
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    return next(read_);
  }

 private:
  __device__ __forceinline__ unsigned char* next(unsigned char*& at) const {
    unsigned char* now = at;
    at = at + step_ == end_ ? begin_ : at + step_;
    return now;
  }
  unsigned char *begin_, *fill_, *read_;
  int step_;
  unsigned char* end_;
  bool three_;
};

// A vector to shared memory in the background, if `inside`.
template <int kBytes>
__device__ __forceinline__ void copy_vector(unsigned char* to, const void* from, bool inside) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %2, 0;\n\t"
        "@p cp.async.cg.shared.global [%0], [%1], 16;\n\t}" ::"r"(address),
        "l"(from), "r"(static_cast<int>(inside))
        : "memory");
  else
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %2, 0;\n\t"
        "@p cp.async.ca.shared.global [%0], [%1], %3;\n\t}" ::"r"(address),
        "l"(from), "r"(static_cast<int>(inside)), "n"(kBytes)
        : "memory");
}

// A thread's way through the rows of a tensor.
template <class S, int N, typename T>
class RowWalk {
 public:
  // Rows lie `stride` elements apart; from element `column` of row `row` on, every `step` rows.
  __device__ __forceinline__ RowWalk(T* data, int64_t stride, int64_t row, int64_t step, int64_t column)
      : at_(data + row * stride + column + static_cast<int>(threadIdx.x) * N), step_(step * stride) {}
  __device__ __forceinline__ void advance() { at_ += step_; }
  // Vector k of this thread.
  __device__ __forceinline__ T* vector(int k) const { return at_ + k * static_cast<int>(blockDim.x) * N; }
  // The row's first `vectors` vectors to a stage.
  __device__ __forceinline__ void copy(unsigned char* to, int vectors) const {
    constexpr int kBytes = N * sizeof(T);
#pragma unroll
    for (int k = 0; k < S::kVectors; ++k) {
      const int i = k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      copy_vector<kBytes>(to + i * kBytes, vector(k), i < vectors);
    }
  }

 private:
  T* at_;
  int64_t step_;
};
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> staged_vector(const unsigned char* at, int i) {
  return load_vector<T, N>(reinterpret_cast<const T*>(at) + i * N);
}

// This thread's vectors of a row of parameters, or zeros where there is none.
template <class S, int N, typename T>
__device__ __forceinline__ void load_parameters(const void* data, int64_t column, int vectors,
                                                Vector<T, N> (&to)[S::kVectors]) {
#pragma unroll
  for (int k = 0; k < S::kVectors; ++k) {
    const int i = k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    to[k] = {};
    if (data && i < vectors) to[k] = load_vector<T, N>(static_cast<const T*>(data) + column + i * N);
  }
}

inline constexpr int kMostWarps = 12;  // of a row, a multiple of 4
// Floats of shared memory that RowSums takes, aligned to 16 bytes.
inline constexpr int kRowSums = 4 * kMostWarps * (kMostRowThreads / 64);

// Sums over the threads of a row, for every one of them; all threads of their warps take part. One barrier
// each, of the row's threads alone: what is written next is not what may still be read.
template <class S>
class RowSums {
 public:
  __device__ __forceinline__ explicit RowSums(float* shared) : partial_(shared) {
    if (one_warp()) return;
    partial_ += threadIdx.y * 4 * kMostWarps;
    for (int i = static_cast<int>(threadIdx.x); i < 4 * kMostWarps; i += static_cast<int>(blockDim.x))
      partial_[i] = 0;
    barrier();
  }
  __device__ __forceinline__ float operator()(float x) {
#pragma unroll
    for (int offset = S::kWarpLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAll, x, offset);
    if (one_warp()) return x;
    float* mine = turn();
    if (threadIdx.x % 32 == 0) mine[threadIdx.x / 32] = x;
    barrier();
    return over_warps(mine);
  }
  // Both sums for little more than one: after the first exchange half of the lanes carries each.
  __device__ __forceinline__ float2 operator()(float a, float b) {
    constexpr unsigned kHalf = S::kWarpLanes / 2;
    const bool upper = threadIdx.x & kHalf;
    float kept = upper ? b : a;
    kept += __shfl_xor_sync(kAll, upper ? a : b, kHalf);
#pragma unroll
    for (unsigned offset = kHalf / 2; offset > 0; offset /= 2) kept += __shfl_xor_sync(kAll, kept, offset);
    if (one_warp())
      return {__shfl_sync(kAll, kept, 0, S::kWarpLanes), __shfl_sync(kAll, kept, kHalf, S::kWarpLanes)};
    float* mine = turn();
    if (threadIdx.x % kHalf == 0) mine[(upper ? kMostWarps : 0) + threadIdx.x / 32] = kept;
    barrier();
    return {over_warps(mine), over_warps(mine + kMostWarps)};
  }

 private:
  static constexpr unsigned kAll = 0xffffffffu;
  static __device__ __forceinline__ bool one_warp() { return !S::kWholeWarps || blockDim.x == 32; }
  static __device__ __forceinline__ void barrier() {
    asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.y + 1), "r"(blockDim.x) : "memory");
  }
  __device__ __forceinline__ float* turn() {
    odd_ = !odd_;
    return partial_ + (odd_ ? 2 * kMostWarps : 0);
  }
  // In ascending order; there are zeros behind the last warp.
  static __device__ __forceinline__ float over_warps(const float* sums) {
    float total = 0;
#pragma unroll 1
    for (unsigned w = 0; w < blockDim.x / 32; w += 4) {
      const auto four = load_vector<float, 4>(sums + w);
      total += four.at[0] + four.at[1] + four.at[2] + four.at[3];
    }
    return total;
  }
  float* partial_;
  bool odd_ = false;
};

// Lets a kernel take what a plan asks for.
template <typename Kernel>
void allow_shared(Kernel* kernel, const RowPlan& plan, const char* operation) {
  if (plan.shared() <= 40 * 1024) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(plan.shared())),
        operation);
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

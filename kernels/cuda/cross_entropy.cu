#include <algorithm>
#include <bit>

#include "kernels/cuda/check.h"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/device/functions.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/ops/cross_entropy.h"

namespace kernels::cuda {

namespace {

constexpr int kMostThreads = 512, kSumThreads = 1024;
constexpr int kAhead = 4;  // vectors a thread loads before it uses the first

struct Entropy {
  int64_t stride;
  int vocabulary;
  const int32_t* targets;
  const float *weights, *seed;
  double* losses;
};

// A row is some elements before the first 16-byte boundary, whole vectors, and some after the last.
template <typename T>
struct RowParts {
  int head, vectors, tail;  // tail: where the rest begins
  __device__ RowParts(const T* row, int n) {
    const auto beyond = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    head = min(n, beyond == 0 ? 0 : kVectorElements<T> - beyond);
    vectors = (n - head) / kVectorElements<T>;
    tail = head + vectors * kVectorElements<T>;
  }
  // The single element that a thread handles, or -1.
  __device__ int single(int thread, int n) const {
    if (thread < head) return thread;
    return thread - head < n - tail ? tail + thread - head : -1;
  }
};

// Maximum and sum of exp(x - maximum) so far. Infinite or undefined values turn the sum into NaN.
struct Running {
  float max = -1e30f, sum = 0;
  __device__ void raise(float above) {
    if (!(above > max)) return;
    sum *= exp_fast(max - above);
    max = above;
  }
  __device__ void add(float x) {
    raise(x);
    sum += exp_fast(x - max);
  }
  template <typename T, int N>
  __device__ void add(const Vector<T, N>& x) {
    float largest = to_float(x.at[0]);
#pragma unroll
    for (int j = 1; j < N; ++j) largest = fmaxf(largest, to_float(x.at[j]));
    raise(largest);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += exp_fast(to_float(x.at[j]) - max);
  }
};

template <typename T, bool kCached>
__device__ __forceinline__ Running first_pass(const T* row, const RowParts<T>& parts, int n,
                                              Vector<T, kVectorElements<T>>* cache) {
  Running running;
  const T* body = row + parts.head;
  for (int first = threadIdx.x; first < parts.vectors; first += kAhead * blockDim.x) {
    Vector<T, kVectorElements<T>> x[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int v = first + k * blockDim.x;
      if (v < parts.vectors) x[k] = load_vector(body + v * kVectorElements<T>);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int v = first + k * blockDim.x;
      if (v >= parts.vectors) break;
      if constexpr (kCached) cache[v] = x[k];
      running.add(x[k]);
    }
  }
  const int single = parts.single(threadIdx.x, n);
  if (single >= 0) running.add(to_float(row[single]));
  return running;
}

// logits <- factor exp(x - max), but for the target's.
template <typename T, bool kCached>
__device__ __forceinline__ void write_gradient(T* row, const RowParts<T>& parts, int n,
                                               const Vector<T, kVectorElements<T>>* cache, float max,
                                               float factor, int target, float at_target) {
  constexpr int N = kVectorElements<T>;
  T* body = row + parts.head;
#pragma unroll 4
  for (int v = threadIdx.x; v < parts.vectors; v += blockDim.x) {
    auto x = kCached ? cache[v] : load_vector(body + v * N);
    const int hit = target - parts.head - v * N;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float p = factor * exp_fast(to_float(x.at[j]) - max);
      x.at[j] = from_float<T>(j == hit ? at_target : p);
    }
    store_global(body + v * N, x);
  }
  const int single = parts.single(threadIdx.x, n);
  if (single >= 0)
    row[single] =
        from_float<T>(single == target ? at_target : factor * exp_fast(to_float(row[single]) - max));
}

template <typename T>
__device__ void clear_row(T* row, const RowParts<T>& parts, int n) {
  Vector<T, kVectorElements<T>> zero;
#pragma unroll
  for (int j = 0; j < kVectorElements<T>; ++j) zero.at[j] = from_float<T>(0.0f);
  for (int v = threadIdx.x; v < parts.vectors; v += blockDim.x)
    store_global(row + parts.head + v * kVectorElements<T>, zero);
  const int single = parts.single(threadIdx.x, n);
  if (single >= 0) row[single] = zero.at[0];
}

// A block has a row; kCached: its vectors wait in shared memory for the second pass.
template <typename T, bool kCached>
__global__ void __launch_bounds__(kMostThreads, 2) entropy_kernel(T* logits, const Entropy e) {
  extern __shared__ uint4 cache_bytes[];
  __shared__ float shared[33];
  auto* cache = reinterpret_cast<Vector<T, kVectorElements<T>>*>(cache_bytes);
  T* row = logits + int64_t{blockIdx.x} * e.stride;
  const int n = e.vocabulary, target = e.targets[blockIdx.x];
  const float weight = e.weights[blockIdx.x];
  const RowParts<T> parts(row, n);
  if (weight == 0 || target < 0) {
    if (threadIdx.x == 0) e.losses[blockIdx.x] = 0;
    if (e.seed) clear_row(row, parts, n);
    return;
  }
  const float at_target = target < n ? to_float(row[target]) : __int_as_float(0x7fffffff);
  Running running = first_pass<T, kCached>(row, parts, n, cache);
  const float max = block_reduce<Max>(running.max, shared, -1e30f);
  running.raise(max);
  // An unknown target is NaN in every gradient of the row.
  float sum = block_reduce<Sum>(running.sum, shared, 0.0f);
  if (target >= n) sum = at_target;
  if (threadIdx.x == 0)
    e.losses[blockIdx.x] = double{weight} * (double{logf(sum)} - (double{at_target} - double{max}));
  if (!e.seed) return;
  const float scale = *e.seed * weight;
  write_gradient<T, kCached>(row, parts, n, cache, max, scale / sum, target,
                             scale * (exp_fast(at_target - max) / sum - 1.0f));
}

// One block adds up the losses in a fixed order.
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const double* losses, int64_t count, double* total) {
  __shared__ double shared[33];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += losses[i];
  sum = block_reduce<Sum>(sum, shared, 0.0);
  if (threadIdx.x == 0) *total += sum;
}

template <typename T>
void launch(const Context& ctx, const Tensor& logits, const Entropy& e) {
  constexpr size_t kReserved = 1024;  // static and system
  const auto vectors = static_cast<size_t>(e.vocabulary / kVectorElements<T>);
  const auto threads = static_cast<unsigned>(
      std::clamp<size_t>(std::bit_ceil(vectors / kAhead + 1), 64, static_cast<size_t>(kMostThreads)));
  const auto blocks = static_cast<unsigned>(logits.rows());
  const size_t bytes = vectors * sizeof(Vector<T, kVectorElements<T>>);
  auto* data = static_cast<T*>(logits.data);
  if (e.seed && bytes + kReserved <= static_cast<size_t>(shared_memory_limit())) {
    const auto kernel = entropy_kernel<T, true>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
          "cross_entropy");
    kernel<<<blocks, threads, bytes, stream_of(ctx)>>>(data, e);
  } else {
    entropy_kernel<T, false><<<blocks, threads, 0, stream_of(ctx)>>>(data, e);
  }
  check_launch("cross_entropy");
}

}  // namespace

void cross_entropy(const Context& ctx, Tensor logits, const Tensor& targets, const Tensor& weights,
                   const Tensor& seed, Tensor loss_sum) {
  const ArenaScope scope(*ctx.scratch);
  const Tensor losses = ctx.scratch->allocate("row losses", DType::f64, {logits.rows()});
  if (ctx.rehearsal || logits.rows() == 0) return;
  const Entropy e{logits.row_stride,   static_cast<int>(logits.cols()),   targets.as<int32_t>(),
                  weights.as<float>(), seed ? seed.as<float>() : nullptr, losses.as<double>()};
  visit_device_dtype(logits.dtype, [&](auto tag) { launch<decltype(tag)>(ctx, logits, e); });
  sum_kernel<<<1, kSumThreads, 0, stream_of(ctx)>>>(e.losses, logits.rows(), loss_sum.as<double>());
  check_launch("cross_entropy");
}

}  // namespace kernels::cuda

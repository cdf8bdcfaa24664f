// Decoding with a cache for every type and head size: one block per query, chunk after chunk.
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/decode.cuh"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/launch.h"

namespace kernels::cuda {

namespace {

constexpr int kThreads = 128;
// Columns of a thread: heads of up to 512 elements.
constexpr int kColumns = 4;

struct Chunk {
  float weights[kChunk];
  const void* values[kChunk];
};

// The sequence that owns a row; -1: none.
__device__ int sequence_of(const int32_t* first_row, int sequences, int row) {
  int low = 0, high = sequences + 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (first_row[middle] > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low == 0 || low > sequences ? -1 : low - 1;
}

// Two threads share a place's score: even and odd columns.
template <typename T>
__device__ float score(const SoftmaxDecode<T>& p, const T* q, const T* key) {
  float sum = 0;
  if (key)
    for (int c = threadIdx.x % 2; c < p.width; c += 2) sum = fmaf(to_float(q[c]), to_float(key[c]), sum);
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  return key ? __fmul_rn(sum, p.scale) : -INFINITY;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) decode_any_kernel(const SoftmaxDecode<T> p) {
  __shared__ Chunk shared;
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.x, head = blockIdx.y, group = p.heads / p.key_heads, key_head = head / group;
  const int sequence = sequence_of(p.first_row, p.sequences, row);
  if (sequence < 0) return;
  const int first = p.first_row[sequence], length = p.length(sequence), lane = threadIdx.x % 32;
  if (head % group == 0)
    for (int c = threadIdx.x; c < p.width; c += kThreads)
      p.template append<1>(sequence, key_head, length, first, row - first, c);
  const auto mask = static_cast<uint64_t>(p.ancestors[row]);
  const int places = length + __popcll(mask);
  const T* q = p.q + row * p.q_stride + int64_t{head} * p.width;
  float maximum = -INFINITY, sum = 0, out[kColumns] = {};
  for (int begin = 0; begin < places; begin += kChunk) {
    const int mine = begin + static_cast<int>(threadIdx.x) / 2;
    const bool inside = mine < places;
    const float s = score(p, q, inside ? p.key(sequence, key_head, length, first, mask, mine) : nullptr);
    __syncthreads();
    if (threadIdx.x % 2 == 0) {
      shared.weights[threadIdx.x / 2] = s;
      shared.values[threadIdx.x / 2] =
          inside ? p.value(sequence, key_head, length, first, mask, mine) : nullptr;
    }
    __syncthreads();
    // Every warp for itself: the same numbers in the same order.
    const float a = shared.weights[lane], b = shared.weights[lane + 32];
    const float top = warp_reduce<Max>(fmaxf(a, b));
    const float chunk_sum = warp_reduce<Sum>(exp2f(a - top) + exp2f(b - top));
    const ChunkWeights w = take_chunk(maximum, sum, top, chunk_sum);
    const int visible = min(places - begin, kChunk);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int c = threadIdx.x + n * kThreads;
      if (c >= p.width) break;
      float fresh = 0;
      for (int j = 0; j < visible; ++j)
        fresh =
            fmaf(exp2f(shared.weights[j] - top), to_float(static_cast<const T*>(shared.values[j])[c]), fresh);
      out[n] = take_value(out[n], fresh, w);
    }
  }
  const float factor = __frcp_rn(sum);
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    const int c = threadIdx.x + n * kThreads;
    if (c < p.width)
      p.o[row * p.o_stride + int64_t{head} * p.width + c] = from_float<T>(__fmul_rn(out[n], factor));
  }
}

}  // namespace

void softmax_decode_any(const Context& ctx, const DecodeCall& call) {
  if (call.q.dim(2) > kColumns * kThreads)
    throw ShapeError("softmax_attention_decode: q is " + to_string(call.q) +
                     "; on a GPU heads of at most 512 elements are supported");
  if (ctx.rehearsal) return;
  visit_device_dtype(call.q.dtype, [&](auto type) {
    using T = decltype(type);
    const dim3 grid(static_cast<unsigned>(call.q.rows()), static_cast<unsigned>(call.q.dim(1)));
    launch(ctx, "softmax_attention_decode", {.grid = grid, .block = kThreads, .dependent = true},
           decode_any_kernel<T>, step_of<T>(call));
  });
}

}  // namespace kernels::cuda

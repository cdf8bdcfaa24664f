// Decoding with a folded state. A row's visible tokens form a list: those committed since the fold, then its
// ancestors and itself. Every sum depends on places in that list and on the width alone, so that a row's
// result is the same bits alone, in a chain or in a tree.
#include <algorithm>

#include "kernels/core/error.h"
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_attention.h"
#include "kernels/ops/linear.h"

namespace kernels::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kColumns = 32;
// Partial sums in flight; part of a sum's order.
constexpr int kParts = 4;

struct FoldedState {
  float *s, *z, *recent_k;
  void* recent_v;
  int64_t s_stride, z_stride, k_stride, v_stride;  // between sequences
};

struct DecodeTask {
  Rows q, k, v, o;
  FoldedState state;
  const int32_t *first_row, *lengths;
  const int64_t* ancestors;
  int heads, key_heads, width;
  int slots;  // for rows since the fold and of the step
  bool normalise;
  float eps;
};

struct CommitTask {
  FoldedState state;
  const int32_t *rows, *counts, *lengths;
  int64_t rows_stride;
  int key_heads, width;
};

// Shared memory of a block: one head's rows since the fold and kColumns columns of the rest.
struct DecodeShared {
  float *keys, *values, *s, *z, *q, *weights;
  int* list;
  int ld;  // of keys: odd, so that 32 rows of one column lie in 32 banks
  int slots;
  __device__ DecodeShared(float* memory, int width, int slots) : ld(width | 1), slots(slots) {
    keys = memory;
    values = keys + slots * ld;
    s = values + slots * kColumns;
    z = s + width * kColumns;
    q = z + width;
    weights = q + kWarps * width;
    list = reinterpret_cast<int*>(weights + kWarps * slots);
  }
};
size_t decode_shared_bytes(int width, int slots) {
  return sizeof(float) * static_cast<size_t>(slots * (width | 1) + slots * kColumns + width * kColumns +
                                             width + kWarps * width + 2 * kWarps * slots);
}

// The state: S, z and rows [0, committed).
template <class T>
__device__ void stage_state(const DecodeTask& t, const DecodeShared& m, int sequence, int key_head,
                            int column, int committed) {
  const int64_t slot = int64_t{t.key_heads} * t.width, head = int64_t{key_head} * t.width;
  const float* recent_k = t.state.recent_k + sequence * t.state.k_stride + head;
  const T* recent_v = static_cast<const T*>(t.state.recent_v) + sequence * t.state.v_stride + head;
#pragma unroll 4
  for (int i = threadIdx.x; i < committed * t.width; i += kThreads) {
    const int row = i / t.width, d = i % t.width;
    m.keys[row * m.ld + d] = recent_k[row * slot + d];
  }
#pragma unroll 4
  for (int i = threadIdx.x; i < committed * kColumns; i += kThreads) {
    const int n = column + i % kColumns;
    if (n < t.width) m.values[i] = to_float(recent_v[i / kColumns * slot + n]);
  }
  const float* s = t.state.s + sequence * t.state.s_stride + head * t.width;
#pragma unroll 4
  for (int i = threadIdx.x; i < t.width * kColumns; i += kThreads) {
    const int n = column + i % kColumns;
    if (n < t.width) m.s[i] = s[i / kColumns * t.width + n];
  }
  const float* z = t.state.z + sequence * t.state.z_stride + head;
  for (int d = threadIdx.x; d < t.width; d += kThreads) m.z[d] = z[d];
}

// The step's rows behind them; phi(k) is made here, once.
template <class T>
__device__ void stage_rows(const DecodeTask& t, const DecodeShared& m, int key_head, int column,
                           int committed, int first_row, int rows) {
  const int64_t head = int64_t{key_head} * t.width;
  const T* k = static_cast<const T*>(t.k.data) + first_row * t.k.stride + head;
  const T* v = static_cast<const T*>(t.v.data) + first_row * t.v.stride + head;
  for (int i = threadIdx.x; i < rows * t.width; i += kThreads) {
    const int row = i / t.width, d = i % t.width;
    m.keys[(committed + row) * m.ld + d] = phi(to_float(k[row * t.k.stride + d]));
  }
  for (int i = threadIdx.x; i < rows * kColumns; i += kThreads) {
    const int row = i / kColumns, n = column + i % kColumns;
    if (n < t.width) m.values[committed * kColumns + i] = to_float(v[row * t.v.stride + n]);
  }
}

// The block's columns of the new rows go to the state.
template <class T>
__device__ void append(const DecodeTask& t, const DecodeShared& m, int sequence, int key_head, int column,
                       int committed, int first_row, int rows) {
  const int64_t slot = int64_t{t.key_heads} * t.width, head = int64_t{key_head} * t.width;
  float* recent_k = t.state.recent_k + sequence * t.state.k_stride + head;
  T* recent_v = static_cast<T*>(t.state.recent_v) + sequence * t.state.v_stride + head;
  const T* v = static_cast<const T*>(t.v.data) + first_row * t.v.stride + head;
  for (int i = threadIdx.x; i < rows * kColumns; i += kThreads) {
    const int row = i / kColumns, n = column + i % kColumns;
    if (n >= t.width) continue;
    recent_k[(committed + row) * slot + n] = m.keys[(committed + row) * m.ld + n];
    recent_v[(committed + row) * slot + n] = v[row * t.v.stride + n];
  }
}

// part += the terms of [0, count): fn(i, x) adds term i to x.
template <class Fn>
__device__ __forceinline__ void add_terms(float (&part)[kParts], int count, Fn fn) {
  int i = 0;
  for (; i + kParts <= count; i += kParts)
#pragma unroll
    for (int j = 0; j < kParts; ++j) part[j] = fn(i + j, part[j]);
  for (; i < count; ++i) part[0] = fn(i, part[0]);
}

__device__ __forceinline__ float total(const float (&part)[kParts]) {
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// One query on one warp; lane n owns column n.
template <class T, class Out>
__device__ void decode_query(const DecodeTask& t, const DecodeShared& m, int row, int head, int column,
                             int committed, uint64_t ancestors) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = t.width;
  float *q = m.q + warp * width, *weights = m.weights + warp * m.slots;
  int* list = m.list + warp * m.slots;
  const T* query = static_cast<const T*>(t.q.data) + row * t.q.stride + int64_t{head} * width;
  __syncwarp();
  for (int d = lane; d < width; d += 32) q[d] = phi(to_float(query[d]));
  for (int i = lane; i < committed; i += 32) list[i] = i;
  for (int bit = lane; bit < 64; bit += 32)
    if (ancestors >> bit & 1)
      list[committed + __popcll(ancestors & ((uint64_t{1} << bit) - 1))] = committed + bit;
  const int count = committed + __popcll(ancestors);
  __syncwarp();
  float sum = 0;
  for (int i = lane; i < count; i += 32) {
    const float* key = m.keys + list[i] * m.ld;
    float part[kParts] = {};
    add_terms(part, width, [&](int d, float x) { return fmaf(q[d], key[d], x); });
    weights[i] = total(part);
    sum += weights[i];
  }
  for (int d = lane; d < width; d += 32) sum = fmaf(q[d], m.z[d], sum);
  sum = warp_reduce<Sum>(sum) + t.eps;
  __syncwarp();
  float part[kParts] = {};
  add_terms(part, width, [&](int d, float x) { return fmaf(q[d], m.s[d * kColumns + lane], x); });
  add_terms(part, count,
            [&](int i, float x) { return fmaf(weights[i], m.values[list[i] * kColumns + lane], x); });
  if (column + lane >= width) return;
  Out* o = static_cast<Out*>(t.o.data) + row * t.o.stride + int64_t{head} * width + column;
  o[lane] = from_float<Out>(t.normalise ? total(part) / sum : total(part));
}

// blockIdx.x: sequence, key head and columns; blockIdx.y takes every gridDim.y-th group of kWarps queries.
template <class T, class Out>
__global__ void __launch_bounds__(kThreads) linear_decode(const DecodeTask t) {
  extern __shared__ float memory[];
  const DecodeShared m(memory, t.width, t.slots);
  let_next_start();
  const int blocks = (t.width + kColumns - 1) / kColumns, column = blockIdx.x % blocks * kColumns;
  const int key_head = blockIdx.x / blocks % t.key_heads, sequence = blockIdx.x / blocks / t.key_heads;
  const int first_row = t.first_row[sequence], rows = t.first_row[sequence + 1] - first_row;
  const int group = t.heads / t.key_heads, queries = rows * group;
  if (static_cast<int>(blockIdx.y) * kWarps >= queries) return;
  const int committed = t.lengths[sequence] % static_cast<int>(kFold);
  stage_state<T>(t, m, sequence, key_head, column, committed);
  wait_for_previous();
  stage_rows<T>(t, m, key_head, column, committed, first_row, rows);
  __syncthreads();
  if (blockIdx.y == 0) append<T>(t, m, sequence, key_head, column, committed, first_row, rows);
  for (int i = blockIdx.y * kWarps + threadIdx.x / 32; i < queries; i += gridDim.y * kWarps) {
    const int row = first_row + i / group;
    decode_query<T, Out>(t, m, row, key_head * group + i % group, column, committed,
                         static_cast<uint64_t>(t.ancestors[row]));
  }
}

// Accepted rows move to where plain decoding would have put them. No row is written before it is read: the
// i-th accepted row is row i or a later one.
template <class X>
__device__ void gather(X* head, int64_t slot, int width, const int32_t* rows, int first, int count) {
  for (int i = threadIdx.x; i < width; i += kThreads) {
    X* column = head + first * slot + i;
#pragma unroll 4
    for (int r = 0; r < count; ++r)
      if (rows[r] != r) column[r * slot] = column[rows[r] * slot];
  }
}

// S += phi(k_j) v_j^T and z += phi(k_j), rows in order, 4 x 4 elements of S per thread at a time.
template <class T>
__device__ void fold(const FoldedState& state, const float* k, const T* v, float* s, float* z, int64_t slot,
                     int width) {
  extern __shared__ float memory[];
  const int padded = (width + 3) / 4 * 4;
  float *keys = memory, *values = memory + kFold * padded;
  for (int i = threadIdx.x; i < static_cast<int>(kFold) * padded; i += kThreads) {
    const int row = i / padded, d = i % padded;
    keys[i] = d < width ? k[row * slot + d] : 0;
    values[i] = d < width ? to_float(v[row * slot + d]) : 0;
  }
  __syncthreads();
  const int side = padded / 4;
  for (int tile = threadIdx.x; tile < side * side; tile += kThreads) {
    const int d = tile / side * 4, n = tile % side * 4;
    float sum[4][4];
    for (int a = 0; a < 4; ++a)
      for (int b = 0; b < 4; ++b)
        sum[a][b] = d + a < width && n + b < width ? s[int64_t{d + a} * width + n + b] : 0;
    for (int j = 0; j < kFold; ++j) {
      const auto key = load_vector(keys + j * padded + d), value = load_vector(values + j * padded + n);
      for (int a = 0; a < 4; ++a)
        for (int b = 0; b < 4; ++b) sum[a][b] = fmaf(key.at[a], value.at[b], sum[a][b]);
    }
    for (int a = 0; a < 4; ++a)
      for (int b = 0; b < 4; ++b)
        if (d + a < width && n + b < width) s[int64_t{d + a} * width + n + b] = sum[a][b];
  }
  for (int d = threadIdx.x; d < width; d += kThreads) {
    float sum = z[d];
    for (int j = 0; j < kFold; ++j) sum += keys[j * padded + d];
    z[d] = sum;
  }
}

// A block: one head of one sequence.
template <class T>
__global__ void __launch_bounds__(kThreads) linear_commit(const CommitTask t) {
  let_next_start();
  wait_for_previous();
  const int sequence = blockIdx.x / t.key_heads, key_head = blockIdx.x % t.key_heads;
  const int count = t.counts[sequence], length = t.lengths[sequence];
  if (count <= 0) return;
  const int64_t slot = int64_t{t.key_heads} * t.width, head = int64_t{key_head} * t.width;
  float* k = t.state.recent_k + sequence * t.state.k_stride + head;
  T* v = static_cast<T*>(t.state.recent_v) + sequence * t.state.v_stride + head;
  const int32_t* rows = t.rows + sequence * t.rows_stride;
  const int first = length % static_cast<int>(kFold);
  gather(k, slot, t.width, rows, first, count);
  gather(v, slot, t.width, rows, first, count);
  if ((length + count) % kFold != 0) return;
  __syncthreads();
  fold(t.state, k, v, t.state.s + sequence * t.state.s_stride + head * t.width,
       t.state.z + sequence * t.state.z_stride + head, slot, t.width);
}

FoldedState folded(const LinearAttentionState& x) {
  return {x.s.as<float>(), x.z.as<float>(), x.recent_k.as<float>(), x.recent_v.data,
          x.s.row_stride,  x.z.row_stride,  x.recent_k.row_stride,  x.recent_v.row_stride};
}

size_t commit_shared_bytes(int64_t width) {
  return 2 * kFold * static_cast<size_t>((width + 3) / 4 * 4) * sizeof(float);
}

// Rows since the fold, and of the largest step, lie in shared memory.
void check_width(const char* operation, int64_t width) {
  const size_t decode = decode_shared_bytes(static_cast<int>(width), kFold + kMaxDecodeRows);
  check_shared_memory(operation, width, std::max(decode, commit_shared_bytes(width)));
}

template <class Task>
void run_kernel(const Context& ctx, const char* name, void (*kernel)(Task), dim3 grid, size_t bytes,
                const Task& task) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        name);
  launch(ctx, name,
         {.grid = grid, .block = kThreads, .dependent = true, .shared = static_cast<unsigned>(bytes)}, kernel,
         task);
}

}  // namespace

void linear_attention_decode(const Context& ctx, const LinearAttentionParams& params, const Tensor& q,
                             const Tensor& k, const Tensor& v, const DecodeRows& rows,
                             LinearAttentionState& state, Tensor o) {
  check_width("linear_attention_decode", q.dim(2));
  if (ctx.rehearsal || q.numel() == 0) return;
  const auto rows_of = [](const Tensor& x) { return Rows{x.data, x.row_stride}; };
  const DecodeTask task{.q = rows_of(q),
                        .k = rows_of(k),
                        .v = rows_of(v),
                        .o = rows_of(o),
                        .state = folded(state),
                        .first_row = rows.first_row.as<int32_t>(),
                        .lengths = rows.lengths.as<int32_t>(),
                        .ancestors = rows.ancestors.as<int64_t>(),
                        .heads = static_cast<int>(q.dim(1)),
                        .key_heads = static_cast<int>(k.dim(1)),
                        .width = static_cast<int>(q.dim(2)),
                        .slots = static_cast<int>(kFold + std::min(q.rows(), kMaxDecodeRows)),
                        .normalise = params.normalise,
                        .eps = params.eps};
  const int64_t sequences = state.s.rows(), blocks = (q.dim(2) + kColumns - 1) / kColumns;
  const int64_t queries = q.rows() * (q.dim(1) / k.dim(1)) / sequences;
  const dim3 grid(static_cast<unsigned>(sequences * k.dim(1) * blocks),
                  static_cast<unsigned>(std::clamp<int64_t>((queries + kWarps - 1) / kWarps, 1, 8)));
  const size_t bytes = decode_shared_bytes(task.width, task.slots);
  visit_device_dtype(q.dtype, [&](auto t) {
    const auto run = [&](auto out) {
      run_kernel(ctx, "linear_attention_decode", linear_decode<decltype(t), decltype(out)>, grid, bytes,
                 task);
    };
    o.dtype == DType::f32 ? run(float{}) : run(t);
  });
}

void linear_attention_commit(const Context& ctx, const CommitPath& path, LinearAttentionState& state) {
  check_width("linear_attention_commit", state.s.dim(2));
  if (ctx.rehearsal) return;
  const CommitTask task{.state = folded(state),
                        .rows = path.rows.as<int32_t>(),
                        .counts = path.counts.as<int32_t>(),
                        .lengths = path.lengths.as<int32_t>(),
                        .rows_stride = path.rows.row_stride,
                        .key_heads = static_cast<int>(state.s.dim(1)),
                        .width = static_cast<int>(state.s.dim(2))};
  const auto grid = static_cast<unsigned>(state.s.rows() * state.s.dim(1));
  const size_t bytes = commit_shared_bytes(task.width);
  visit_device_dtype(state.recent_v.dtype, [&](auto t) {
    run_kernel(ctx, "linear_attention_commit", linear_commit<decltype(t)>, dim3(grid), bytes, task);
  });
}

}  // namespace kernels::cuda

// Training attention in own kernels, for what cuDNN does not take: fp32, odd head sizes. A block owns 32
// rows, eight to a warp, and meets the rows they see in tiles of 32: for scores a lane is one of the tile's
// rows, for sums over the tile a lane is a column. Every row sees one interval of rows, found by searching
// cu_seqlens: a query sees [begin, i + 1), a key is seen by [j, end).
#include <utility>

#include "kernels/cuda/check.h"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/softmax_attention.h"

namespace kernels::cuda {

namespace {

constexpr int kTile = 32, kWarps = 4, kOwn = kTile / kWarps, kThreads = kWarps * 32;
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// Rows of a tensor (N, H, D). The type is looked up at every element: one kernel for all types, since what
// has to be fast goes elsewhere.
struct Rows {
  void* data;
  int64_t stride;
  DType type;

  __device__ float get(int64_t row, int column) const {
    const int64_t at = row * stride + column;
    if (type == DType::f32) return static_cast<const float*>(data)[at];
    if (type == DType::f16) return to_float(static_cast<const __half*>(data)[at]);
    return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
  }
  __device__ void set(int64_t row, int column, float x) const {
    const int64_t at = row * stride + column;
    if (type == DType::f32) {
      static_cast<float*>(data)[at] = x;
    } else if (type == DType::f16) {
      static_cast<__half*>(data)[at] = from_float<__half>(x);
    } else {
      static_cast<__nv_bfloat16*>(data)[at] = from_float<__nv_bfloat16>(x);
    }
  }
};
Rows rows_of(const Tensor& x) { return {x.data, x.row_stride, x.dtype}; }

struct LogSum {
  float* data;
  int64_t stride, by_sequence;  // rows of a sequence where ordered (sequence, head, row), else 0
  int heads;
  __device__ float& at(int64_t row, int head) const {
    if (by_sequence == 0) return data[row * stride + head];
    return data[(row / by_sequence * heads + head) * by_sequence + row % by_sequence];
  }
};

struct Sequences {
  const int32_t* cu;
  int64_t count, rows;
  // The rows that `row` sees as a query, or that see it as a key; empty for a row of no sequence.
  __device__ int2 interval(int64_t row, bool query) const {
    int64_t low = 0, high = count + 1;  // the first boundary above the row lies in [low, high]
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cu[middle] > row) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    if (low == 0 || low > count || row >= rows) return {0, 0};
    const int at = static_cast<int>(row);
    if (query) return {cu[low - 1], at + 1};
    return {at, min(cu[low], static_cast<int>(rows))};
  }
};

struct Shared {
  int2 interval[kTile];
  int2 span;  // of all rows of the block
};

__device__ void find_intervals(Shared& shared, const Sequences& sequences, int64_t first, bool query) {
  if (threadIdx.x < kTile) {
    const int2 mine = sequences.interval(first + threadIdx.x, query);
    shared.interval[threadIdx.x] = mine;
    const bool empty = mine.x >= mine.y;
    const int low = -warp_reduce<Max>(empty ? -0x7fffffff : -mine.x);
    const int high = warp_reduce<Max>(empty ? 0 : mine.y);
    if (threadIdx.x == 0) shared.span = {low, high};
  }
  __syncthreads();
}

// to[column][row]: 32 rows from `first` on, zeros beyond `end` and beyond the width.
template <int D>
__device__ void load_own(float* to, const Rows& from, int64_t first, int64_t end, int head, int width) {
  for (int i = threadIdx.x; i < kTile * D; i += kThreads) {
    const int row = i / D, c = i % D;
    const bool inside = first + row < end && c < width;
    to[c * kTile + row] = inside ? from.get(first + row, head * width + c) : 0.0f;
  }
}
// to[row][column], rows D + 1 apart: neither rows nor columns collide in a bank.
template <int D>
__device__ void load_tile(float* to, const Rows& from, int64_t first, int64_t end, int head, int width) {
  for (int i = threadIdx.x; i < kTile * D; i += kThreads) {
    const int row = i / D, c = i % D;
    const bool inside = first + row < end && c < width;
    to[row * (D + 1) + c] = inside ? from.get(first + row, head * width + c) : 0.0f;
  }
}

// s[r] = own row r of this warp . tile row `lane`.
template <int D>
__device__ __forceinline__ void dots(const float* own, const float* tile, float (&s)[kOwn]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < kOwn; ++r) s[r] = 0;
#pragma unroll 8
  for (int c = 0; c < D; ++c) {
    const float x = tile[lane * (D + 1) + c];
    const auto a = load_vector<float, kOwn / 2>(own + c * kTile + warp * kOwn);
    const auto b = load_vector<float, kOwn / 2>(own + c * kTile + warp * kOwn + kOwn / 2);
#pragma unroll
    for (int r = 0; r < kOwn / 2; ++r) {
      s[r] = fmaf(a.at[r], x, s[r]);
      s[r + kOwn / 2] = fmaf(b.at[r], x, s[r + kOwn / 2]);
    }
  }
}

// sum[r][i] += over tile rows j: w_j[r] tile[j][lane + 32 i], where lane j holds w_j. `weights` holds 32 x 8
// numbers of this warp.
template <int D>
__device__ __forceinline__ void add_tile(const float (&w)[kOwn], float* weights, const float* tile,
                                         float (&sum)[kOwn][D / 32]) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kOwn; ++r) weights[lane * kOwn + r] = w[r];
  __syncwarp();
#pragma unroll 4
  for (int j = 0; j < kTile; ++j) {
    const auto a = load_vector<float, kOwn / 2>(weights + j * kOwn);
    const auto b = load_vector<float, kOwn / 2>(weights + j * kOwn + kOwn / 2);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      const float x = tile[j * (D + 1) + lane + 32 * i];
#pragma unroll
      for (int r = 0; r < kOwn / 2; ++r) {
        sum[r][i] = fmaf(a.at[r], x, sum[r][i]);
        sum[r + kOwn / 2][i] = fmaf(b.at[r], x, sum[r + kOwn / 2][i]);
      }
    }
  }
}

template <int D>
__device__ void store_own(const float (&sum)[kOwn][D / 32], const float (&factor)[kOwn], const Rows& to,
                          int64_t first, int64_t end, int head, int width) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const int64_t row = first + warp * kOwn + r;
    if (row >= end) continue;
#pragma unroll
    for (int i = 0; i < D / 32; ++i)
      if (lane + 32 * i < width) to.set(row, head * width + lane + 32 * i, sum[r][i] * factor[r]);
  }
}

__device__ __forceinline__ bool sees(const int2& interval, int64_t row) {
  return row >= interval.x && row < interval.y;
}

struct Forward {
  Rows q, k, v, o;
  LogSum log_sum;
  Sequences sequences;
  int group, width;
  float scale;
};

template <int D>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Forward p) {
  extern __shared__ float4 memory[];
  __shared__ Shared shared;
  float* q = reinterpret_cast<float*>(memory);
  float *weights = q + D * kTile, *keys = weights + kThreads * kOwn, *values = keys + kTile * (D + 1);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = static_cast<int>(blockIdx.y);
  const int64_t first = int64_t{blockIdx.x} * kTile, end = p.sequences.rows;
  load_own<D>(q, p.q, first, end, head, p.width);
  find_intervals(shared, p.sequences, first, true);
  float maximum[kOwn], total[kOwn] = {}, out[kOwn][D / 32] = {};
#pragma unroll
  for (int r = 0; r < kOwn; ++r) maximum[r] = -INFINITY;
  for (int64_t tile = shared.span.x; tile < shared.span.y; tile += kTile) {
    __syncthreads();
    load_tile<D>(keys, p.k, tile, shared.span.y, head / p.group, p.width);
    load_tile<D>(values, p.v, tile, shared.span.y, head / p.group, p.width);
    __syncthreads();
    float s[kOwn];
    dots<D>(q, keys, s);
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const bool seen = sees(shared.interval[warp * kOwn + r], tile + lane);
      const float score = seen ? s[r] * p.scale * kLog2e : -INFINITY;
      const float top = fmaxf(maximum[r], warp_reduce<Max>(score));
      const float shrink = top == maximum[r] ? 1.0f : exp2f(maximum[r] - top);
      s[r] = seen ? exp2f(score - top) : 0.0f;
      total[r] = total[r] * shrink + s[r];
#pragma unroll
      for (int i = 0; i < D / 32; ++i) out[r][i] *= shrink;
      maximum[r] = top;
    }
    add_tile<D>(s, weights + warp * 32 * kOwn, values, out);
  }
  float factor[kOwn];
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const int64_t row = first + warp * kOwn + r;
    const float sum = warp_reduce<Sum>(total[r]);
    factor[r] = sum > 0 ? 1 / sum : 0.0f;
    if (lane == 0 && row < end) p.log_sum.at(row, head) = sum > 0 ? maximum[r] * kLn2 + logf(sum) : 0.0f;
  }
  store_own<D>(out, factor, p.o, first, end, head, p.width);
}

// One warp per row and head: delta = dout . o.
__global__ void delta_kernel(Rows dout, Rows o, float* delta, int64_t rows, int heads, int width) {
  const int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (at >= rows * heads) return;
  const int head = static_cast<int>(at % heads);
  float sum = 0;
  for (int c = threadIdx.x % 32; c < width; c += 32)
    sum = fmaf(dout.get(at / heads, head * width + c), o.get(at / heads, head * width + c), sum);
  sum = warp_reduce<Sum>(sum);
  if (threadIdx.x % 32 == 0) delta[at] = sum;
}

// kKeys: the block owns keys and values and makes dk and dv; else it owns queries and makes dq. a meets b
// for the scores, c meets d for the scores' gradients.
struct Backward {
  Rows own_a, own_c, tile_b, tile_d, da, dc;
  LogSum log_sum;
  const float* delta;  // (N, H)
  Sequences sequences;
  int heads, group, width;
  float scale;
};

template <int D, bool kKeys>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Backward p) {
  extern __shared__ float4 memory[];
  __shared__ Shared shared;
  float* a = reinterpret_cast<float*>(memory);
  float *c = a + D * kTile, *weights = c + D * kTile, *b = weights + kThreads * kOwn;
  float* d = b + kTile * (D + 1);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own_head = static_cast<int>(blockIdx.y);
  const int64_t first = int64_t{blockIdx.x} * kTile, end = p.sequences.rows;
  load_own<D>(a, p.own_a, first, end, own_head, p.width);
  load_own<D>(c, p.own_c, first, end, own_head, p.width);
  find_intervals(shared, p.sequences, first, !kKeys);
  float da[kOwn][D / 32] = {}, dc[kOwn][D / 32] = {};
  for (int member = 0; member < (kKeys ? p.group : 1); ++member) {
    const int query_head = kKeys ? own_head * p.group + member : own_head;
    const int tile_head = kKeys ? query_head : own_head / p.group;
    for (int64_t tile = shared.span.x; tile < shared.span.y; tile += kTile) {
      __syncthreads();
      load_tile<D>(b, p.tile_b, tile, shared.span.y, tile_head, p.width);
      load_tile<D>(d, p.tile_d, tile, shared.span.y, tile_head, p.width);
      __syncthreads();
      float s[kOwn], ds[kOwn];
      dots<D>(a, b, s);
      dots<D>(c, d, ds);
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        const bool seen = sees(shared.interval[warp * kOwn + r], tile + lane);
        const int64_t query = kKeys ? tile + lane : first + warp * kOwn + r;
        const float log_sum = seen ? p.log_sum.at(query, query_head) : 0.0f;
        const float delta = seen ? p.delta[query * p.heads + query_head] : 0.0f;
        s[r] = seen ? exp2f((s[r] * p.scale - log_sum) * kLog2e) : 0.0f;
        ds[r] = s[r] * (ds[r] - delta);
      }
      if constexpr (kKeys) add_tile<D>(s, weights + warp * 32 * kOwn, d, dc);
      add_tile<D>(ds, weights + warp * 32 * kOwn, b, da);
    }
  }
  float scale[kOwn], one[kOwn];
#pragma unroll
  for (int r = 0; r < kOwn; ++r) scale[r] = p.scale, one[r] = 1.0f;
  store_own<D>(da, scale, p.da, first, end, own_head, p.width);
  if constexpr (kKeys) store_own<D>(dc, one, p.dc, first, end, own_head, p.width);
}

size_t shared_bytes(int own, int padded) {
  return sizeof(float) *
         static_cast<size_t>(own * padded * kTile + kThreads * kOwn + 2 * kTile * (padded + 1));
}

template <typename Parameters>
void launch(const Context& ctx, void (*kernel)(Parameters), const Parameters& p, int64_t heads, int own,
            int padded) {
  const size_t bytes = shared_bytes(own, padded);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "softmax_attention");
  const dim3 grid(static_cast<unsigned>((p.sequences.rows + kTile - 1) / kTile),
                  static_cast<unsigned>(heads));
  kernel<<<grid, kThreads, bytes, stream_of(ctx)>>>(p);
  check_launch("softmax_attention");
}

// Calls fn(padded head size).
template <typename Fn>
void visit(const AttentionCall& c, Fn&& fn) {
  if (c.width() <= 32) return fn(std::integral_constant<int, 32>{});
  if (c.width() <= 64) return fn(std::integral_constant<int, 64>{});
  if (c.width() <= 128) return fn(std::integral_constant<int, 128>{});
  fn(std::integral_constant<int, 256>{});
}

LogSum log_sum_of(const AttentionCall& c) {
  return {static_cast<float*>(c.log_sum.data), c.log_sum.row_stride, c.by_sequence() ? c.hints.longest : 0,
          static_cast<int>(c.heads())};
}
Sequences sequences_of(const AttentionCall& c) {
  return {c.cu_seqlens.as<int32_t>(), c.sequences(), c.rows()};
}
float scale_of(const AttentionCall& c) { return 1.0f / sqrtf(static_cast<float>(c.width())); }

void forward(const Context& ctx, const AttentionCall& c) {
  const Forward p{.q = rows_of(c.q),
                  .k = rows_of(c.k),
                  .v = rows_of(c.v),
                  .o = rows_of(c.o),
                  .log_sum = log_sum_of(c),
                  .sequences = sequences_of(c),
                  .group = static_cast<int>(c.heads() / c.key_heads()),
                  .width = static_cast<int>(c.width()),
                  .scale = scale_of(c)};
  visit(c, [&](auto padded) { launch(ctx, forward_kernel<padded()>, p, c.heads(), 1, padded()); });
}

void backward(const Context& ctx, const AttentionCall& c, float* delta) {
  constexpr int64_t kWarpsPerBlock = 8;
  Backward p{.own_a = rows_of(c.q),
             .own_c = rows_of(c.dout),
             .tile_b = rows_of(c.k),
             .tile_d = rows_of(c.v),
             .da = rows_of(c.dq),
             .dc = {},
             .log_sum = log_sum_of(c),
             .delta = delta,
             .sequences = sequences_of(c),
             .heads = static_cast<int>(c.heads()),
             .group = static_cast<int>(c.heads() / c.key_heads()),
             .width = static_cast<int>(c.width()),
             .scale = scale_of(c)};
  const auto blocks = static_cast<unsigned>((c.rows() * c.heads() + kWarpsPerBlock - 1) / kWarpsPerBlock);
  delta_kernel<<<blocks, kWarpsPerBlock * 32, 0, stream_of(ctx)>>>(p.own_c, rows_of(c.o), delta, c.rows(),
                                                                   p.heads, p.width);
  check_launch("softmax_attention_backward");
  visit(c, [&](auto padded) {
    launch(ctx, backward_kernel<padded(), false>, p, c.heads(), 2, padded());
    std::swap(p.own_a, p.tile_b);
    std::swap(p.own_c, p.tile_d);
    p.da = rows_of(c.dk), p.dc = rows_of(c.dv);
    launch(ctx, backward_kernel<padded(), true>, p, c.key_heads(), 2, padded());
  });
}

}  // namespace

void tiled_attention(const Context& ctx, const AttentionCall& call) {
  if (call.rows() == 0) return;
  visit(call, [&](auto padded) {
    check_shared_memory("softmax_attention", call.width(), shared_bytes(call.backward() ? 2 : 1, padded()));
  });
  if (!call.backward()) {
    if (!ctx.rehearsal) forward(ctx, call);
    return;
  }
  ArenaScope scope(*ctx.scratch);
  const Tensor delta = ctx.scratch->allocate("attention delta", DType::f32, {call.rows(), call.heads()});
  if (!ctx.rehearsal) backward(ctx, call, delta.as<float>());
}

}  // namespace kernels::cuda

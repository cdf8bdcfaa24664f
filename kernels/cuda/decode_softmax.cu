// Decoding with a cache on tensor cores: fp16 and bf16, head sizes 32, 64 and 128. A tile is up to 16 queries
// of one key head, whole rows where they fit. A full chunk of committed slots meets all of a tile's queries;
// the last chunks of a row, which hold its own ancestors, are gathered for that row alone and meet the same
// instructions. Few tiles: one block per chunk, partial results in memory, and the tile's last block takes
// them in order; what the cache holds is fetched while the kernel ahead still runs. Many tiles: one block
// takes all chunks of its tile, in the same order with the same bits.
#include <algorithm>

#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/decode.cuh"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/device/matrix.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/ops/linear.h"

namespace kernels::cuda {

namespace {

constexpr int kThreads = 128, kQueries = 16;
constexpr int64_t kFewTiles = 264;
constexpr int kAhead = 10;  // partial results that are fetched at once

// How many blocks of a tile have finished; each tile's last one sets it to 0 again. Decoding steps follow one
// another in one stream of a device.
__device__ unsigned finished[kFewTiles];

template <typename T>
struct Tiles {
  SoftmaxDecode<T> step;
  int group;        // queries of a row: H / Hk
  int rows, parts;  // of a tile: rows; tiles that a row's queries take
  int row_queries;  // queries of one row in a tile
  int chunks;       // capacity of the partial results, per query
  bool split;
  float2* statistics;  // (N, H, chunks): maximum, sum
  float* values;       // (N, H, chunks, D)
};

// Blocks are started in the order of x, then y, then z: blockIdx.x is the tile of a sequence's key head, y
// the sequence and key head, z the item. Items that are not there come last.
struct Tile {
  int sequence, key_head, first, count, length, full;  // full: chunks of committed slots only
  int row, rows, query;                                // first row, rows, first query of a row
};

template <typename T>
__device__ Tile tile_of(const Tiles<T>& p) {
  Tile t;
  t.sequence = blockIdx.y / p.step.key_heads;
  t.key_head = blockIdx.y % p.step.key_heads;
  t.first = p.step.first_row[t.sequence];
  t.count = min(p.step.first_row[t.sequence + 1] - t.first, int{kMaxDecodeRows});
  t.length = p.step.length(t.sequence);
  t.full = t.length / kChunk;
  t.row = blockIdx.x / p.parts * p.rows;
  t.rows = min(p.rows, t.count - t.row);
  t.query = blockIdx.x % p.parts * kQueries;
  return t;
}

// Item x of a tile: a full chunk, or one of the two last chunks of a row: the first of every row, then the
// second.
struct Item {
  int chunk, row;  // row: within the tile; -1: full
  uint64_t ancestors;
  int visible;  // places of the chunk; 0: there is no such chunk
};

template <typename T>
__device__ uint64_t ancestors_of(const Tiles<T>& p, const Tile& t, int row) {
  return static_cast<uint64_t>(p.step.ancestors[t.first + t.row + row]);
}

template <typename T>
__device__ Item item_of(const Tiles<T>& p, const Tile& t, int x) {
  if (x < t.full) return {x, -1, 0, kChunk};
  const int row = (x - t.full) % p.rows, chunk = t.full + (x - t.full) / p.rows;
  if (row >= t.rows) return {chunk, row, 0, 0};
  const uint64_t ancestors = ancestors_of(p, t, row);
  const int places = t.length + __popcll(ancestors) - chunk * kChunk;
  return {chunk, row, ancestors, min(max(places, 0), kChunk)};
}

template <typename T>
__device__ int chunks_of(const Tiles<T>& p, const Tile& t, int row) {
  return (t.length + __popcll(ancestors_of(p, t, row)) + kChunk - 1) / kChunk;
}

// Query i of the tile: its row within the tile and its head; false where there is none.
template <typename T>
__device__ bool find_query(const Tiles<T>& p, const Tile& t, int i, int& row, int& head) {
  row = i / p.row_queries;
  const int member = t.query + i % p.row_queries;
  head = t.key_head * p.group + member;
  return row < t.rows && member < p.group;
}

// Rows are 16 bytes apart from a multiple of 128: eight rows of a matrix lie in different banks.
template <typename T, int D>
struct Memory {
  static constexpr int kRow = D + 8;
  struct Stage {
    T k[kChunk][kRow], v[kChunk][kRow];
  };
  T q[kQueries][kRow];
  T p[kQueries][kChunk + 8];
  float maximum[4][kQueries], sum[4][kQueries];
  unsigned remaining;           // blocks of the tile that have not finished
  alignas(16) Stage stages[2];  // one where a block takes one chunk
};

template <typename T, int D>
__device__ void load_queries(const Tiles<T>& p, const Tile& t, Memory<T, D>& m) {
  for (int i = threadIdx.x; i < kQueries * D / 8; i += kThreads) {
    const int query = i / (D / 8), c = i % (D / 8) * 8;
    int row, head;
    const bool inside = find_query(p, t, query, row, head);
    const T* from = p.step.q + (inside ? (t.first + t.row + row) * p.step.q_stride + head * D : 0) + c;
    copy_16(&m.q[query][c], from, inside);
  }
}

// The item's places in the cache, and zeros behind the last place; or those of the step's own rows.
template <bool kStored, typename T, int D>
__device__ void load_places(const Tiles<T>& p, const Tile& t, const Item& item, int stage, Memory<T, D>& m) {
#pragma unroll
  for (int n = 0; n < kChunk * D / 8 / kThreads; ++n) {
    const int i = n * kThreads + threadIdx.x, place = i / (D / 8), c = i % (D / 8) * 8;
    const bool inside = place < item.visible;
    const int at = inside ? item.chunk * kChunk + place : 0;
    if ((!inside || at < t.length) != kStored) continue;
    copy_16(&m.stages[stage].k[place][c],
            p.step.key(t.sequence, t.key_head, t.length, t.first, item.ancestors, at) + c, inside);
    copy_16(&m.stages[stage].v[place][c],
            p.step.value(t.sequence, t.key_head, t.length, t.first, item.ancestors, at) + c, inside);
  }
}

// What a chunk gives: this thread's maximum and sum for queries lane / 4 and lane / 4 + 8, and its elements
// of the weighted sum of values: columns warp * D / 4 + 8 n + 2 (lane % 4) + {0, 1}.
template <int D>
struct Partial {
  float maximum[2], sum[2], out[D / 32][4];
};

// Scores of 16 queries and the warp's 16 places.
template <typename T, int D>
__device__ __forceinline__ void scores(const Memory<T, D>& m, int stage, float scale, int visible,
                                       float (&s)[2][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    unsigned a[4], b[4];
    load_matrices(a, &m.q[matrix % 2 * 8 + lane % 8][step * 16 + matrix / 2 * 8]);
    load_matrices(b, &m.stages[stage].k[warp * 16 + matrix / 2 * 8 + lane % 8][step * 16 + matrix % 2 * 8]);
    multiply<T>(s[0], a, b[0], b[1]);
    multiply<T>(s[1], a, b[2], b[3]);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = warp * 16 + n * 8 + lane % 4 * 2 + i % 2;
      s[n][i] = place < visible ? __fmul_rn(s[n][i], scale) : -INFINITY;
    }
}

template <typename T>
__device__ __forceinline__ void store_pair(T* to, float a, float b) {
  store_vector(to, Vector<T, 2>{from_float<T>(a), from_float<T>(b)});
}

template <typename T, int D>
__device__ void compute_chunk(Memory<T, D>& m, int stage, float scale, int visible, Partial<D>& out) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8;
  float s[2][4] = {};
  scores<T, D>(m, stage, scale, visible, s);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]), fmaxf(s[1][2 * half], s[1][2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    if (lane % 4 == 0) m.maximum[warp][lane / 4 + 8 * half] = top;
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = lane / 4 + 8 * half;
    const float top = fmaxf(fmaxf(m.maximum[0][query], m.maximum[1][query]),
                            fmaxf(m.maximum[2][query], m.maximum[3][query]));
    float sum = 0;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float a = exp2f(s[n][2 * half] - top), b = exp2f(s[n][2 * half + 1] - top);
      store_pair(&m.p[query][warp * 16 + n * 8 + lane % 4 * 2], a, b);
      sum += a + b;
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane % 4 == 0) m.sum[warp][query] = sum;
    out.maximum[half] = top;
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = lane / 4 + 8 * half;
    out.sum[half] = (m.sum[0][query] + m.sum[1][query]) + (m.sum[2][query] + m.sum[3][query]);
  }
#pragma unroll
  for (int n = 0; n < D / 32; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) out.out[n][i] = 0;
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
    unsigned a[4];
    load_matrices(a, &m.p[matrix % 2 * 8 + lane % 8][step * 16 + matrix / 2 * 8]);
#pragma unroll
    for (int n = 0; n < D / 32; ++n) {
      unsigned b[2];
      load_transposed(b, &m.stages[stage].v[step * 16 + lane % 16][warp * (D / 4) + n * 8]);
      multiply<T>(out.out[n], a, b[0], b[1]);
    }
  }
}

template <typename T, int D>
__device__ void append_tile(const Tiles<T>& p, const Tile& t) {
  constexpr int kWide = 8;
  for (int i = threadIdx.x; i < t.rows * D / kWide; i += kThreads)
    p.step.template append<kWide>(t.sequence, t.key_head, t.length, t.first, t.row + i / (D / kWide),
                                  i % (D / kWide) * kWide);
}

// One block per chunk: the partial result goes to memory.
template <typename T, int D>
__device__ void store_partial(const Tiles<T>& p, const Tile& t, const Item& item, const Partial<D>& x) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row, head;
    if (!find_query(p, t, lane / 4 + 8 * half, row, head) || (item.row >= 0 && item.row != row)) continue;
    const int64_t at = (int64_t{t.first + t.row + row} * p.step.heads + head) * p.chunks + item.chunk;
    if (warp == 0 && lane % 4 == 0) p.statistics[at] = {x.maximum[half], x.sum[half]};
#pragma unroll
    for (int n = 0; n < D / 32; ++n)
      store_pair(p.values + at * D + warp * (D / 4) + n * 8 + lane % 4 * 2, x.out[n][2 * half],
                 x.out[n][2 * half + 1]);
  }
}

template <typename T>
__device__ unsigned blocks_of(const Tiles<T>& p, const Tile& t) {
  unsigned blocks = t.full;
  for (int row = 0; row < t.rows; ++row) blocks += chunks_of(p, t, row) - t.full;
  return blocks;
}

// Whether this is the last of the tile's `blocks`; the others' partial results are then visible.
template <typename T, int D>
__device__ bool finish_block(unsigned blocks, Memory<T, D>& m) {
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(&finished[blockIdx.y * gridDim.x + blockIdx.x]), "r"(blocks - 1)
                 : "memory");
    m.remaining = blocks - 1 - before;
  }
  __syncthreads();
  return m.remaining == 0;
}

template <typename T, int D>
__device__ void take_partials(const Tiles<T>& p, const Tile& t) {
  for (int i = threadIdx.x; i < kQueries * D / 4; i += kThreads) {
    int row, head;
    if (!find_query(p, t, i / (D / 4), row, head)) continue;
    const int64_t query = int64_t{t.first + t.row + row} * p.step.heads + head;
    const int c = i % (D / 4) * 4, chunks = chunks_of(p, t, row);
    float maximum = -INFINITY, sum = 0, out[4] = {};
    for (int first = 0; first < chunks; first += kAhead) {
      float2 x[kAhead];
      float4 y[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int64_t at = query * p.chunks + min(first + j, chunks - 1);
        x[j] = __ldcg(p.statistics + at);
        y[j] = __ldcg(reinterpret_cast<const float4*>(p.values + at * D + c));
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (first + j >= chunks) break;
        const ChunkWeights w = take_chunk(maximum, sum, x[j].x, x[j].y);
        out[0] = take_value(out[0], y[j].x, w), out[1] = take_value(out[1], y[j].y, w);
        out[2] = take_value(out[2], y[j].z, w), out[3] = take_value(out[3], y[j].w, w);
      }
    }
    const float factor = __frcp_rn(sum);
    T* to = p.step.o + (t.first + t.row + row) * p.step.o_stride + head * D + c;
    store_pair(to, __fmul_rn(out[0], factor), __fmul_rn(out[1], factor));
    store_pair(to + 2, __fmul_rn(out[2], factor), __fmul_rn(out[3], factor));
  }
}

template <typename T, int D>
__device__ void run_one_chunk(const Tiles<T>& p, const Tile& t, Memory<T, D>& m) {
  const Item item = item_of(p, t, blockIdx.z);
  if (item.visible == 0) return;
  const unsigned blocks = blocks_of(p, t);
  load_places<true, T, D>(p, t, item, 0, m);
  wait_for_previous();
  load_queries<T, D>(p, t, m);
  if (item.row >= 0) load_places<false, T, D>(p, t, item, 0, m);
  commit_copies();
  if (blockIdx.z == 0 && t.query == 0) append_tile<T, D>(p, t);
  wait_copies<0>();
  __syncthreads();
  Partial<D> x;
  compute_chunk<T, D>(m, 0, p.step.scale, item.visible, x);
  store_partial<T, D>(p, t, item, x);
  if (finish_block<T, D>(blocks, m)) take_partials<T, D>(p, t);
}

template <typename T, int D>
__device__ void store_result(const Tiles<T>& p, const Tile& t, const Partial<D>& x) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row, head;
    if (!find_query(p, t, lane / 4 + 8 * half, row, head)) continue;
    const float factor = __frcp_rn(x.sum[half]);
    T* to = p.step.o + (t.first + t.row + row) * p.step.o_stride + head * D;
#pragma unroll
    for (int n = 0; n < D / 32; ++n)
      store_pair(to + warp * (D / 4) + n * 8 + lane % 4 * 2, __fmul_rn(x.out[n][2 * half], factor),
                 __fmul_rn(x.out[n][2 * half + 1], factor));
  }
}

template <typename T, int D>
__device__ void take(const Tiles<T>& p, const Item& item, const Partial<D>& x, Partial<D>& state) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = (lane / 4 + 8 * half) / p.row_queries;
    if (item.row >= 0 && item.row != row) continue;
    const ChunkWeights w = take_chunk(state.maximum[half], state.sum[half], x.maximum[half], x.sum[half]);
#pragma unroll
    for (int n = 0; n < D / 32; ++n)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i)
        state.out[n][i] = take_value(state.out[n][i], x.out[n][i], w);
  }
}

// The next item behind x that there is; visible is 0 where there is none.
template <typename T>
__device__ Item next_item(const Tiles<T>& p, const Tile& t, int& x) {
  while (++x < t.full + 2 * p.rows) {
    const Item item = item_of(p, t, x);
    if (item.visible > 0) return item;
  }
  return {};
}

template <typename T, int D>
__device__ void load_item(const Tiles<T>& p, const Tile& t, const Item& item, int stage, Memory<T, D>& m) {
  load_places<true, T, D>(p, t, item, stage, m);
  if (item.row >= 0) load_places<false, T, D>(p, t, item, stage, m);
  commit_copies();
}

template <typename T, int D>
__device__ void run_all_chunks(const Tiles<T>& p, const Tile& t, Memory<T, D>& m) {
  if (t.query == 0) append_tile<T, D>(p, t);
  Partial<D> state = {};
  state.maximum[0] = state.maximum[1] = -INFINITY;
  load_queries<T, D>(p, t, m);
  int x = -1, stage = 0;
  Item item = next_item(p, t, x);  // there is one: a row sees itself
  load_item<T, D>(p, t, item, 0, m);
  while (item.visible > 0) {
    const Item next = next_item(p, t, x);
    if (next.visible > 0) {
      load_item<T, D>(p, t, next, stage ^ 1, m);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    Partial<D> fresh;
    compute_chunk<T, D>(m, stage, p.step.scale, item.visible, fresh);
    take<T, D>(p, item, fresh, state);
    __syncthreads();
    item = next;
    stage ^= 1;
  }
  store_result<T, D>(p, t, state);
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads) softmax_decode_kernel(const Tiles<T> p) {
  extern __shared__ __align__(16) char memory[];
  Memory<T, D>& m = *reinterpret_cast<Memory<T, D>*>(memory);
  let_next_start();
  if (!p.split) wait_for_previous();
  const Tile t = tile_of(p);
  if (t.rows <= 0) return;
  if (p.split) {
    run_one_chunk<T, D>(p, t, m);
  } else {
    run_all_chunks<T, D>(p, t, m);
  }
}

// Tiles of a step of `rows` rows, the most that one sequence can have among them.
struct Grid {
  int rows, parts, row_queries, chunks;
  int64_t tiles, all;
  bool split;
};

Grid grid_of(int64_t group, int64_t rows, int64_t capacity, int64_t heads_of_sequences) {
  Grid g;
  g.row_queries = static_cast<int>(std::min<int64_t>(group, kQueries));
  g.parts = static_cast<int>((group + kQueries - 1) / kQueries);
  const int64_t most = std::min(rows, kMaxDecodeRows);
  g.rows = static_cast<int>(std::min<int64_t>(kQueries / g.row_queries, most));
  g.chunks = static_cast<int>((capacity + kChunk - 1) / kChunk + 1);
  g.tiles = (most + g.rows - 1) / g.rows * g.parts;
  g.all = g.tiles * heads_of_sequences;
  g.split = g.all < kFewTiles;
  return g;
}

template <typename T, int D>
void launch_tiles(const Context& ctx, const Tiles<T>& p, const Grid& g) {
  constexpr const char* kName = "softmax_attention_decode";
  const auto kernel = softmax_decode_kernel<T, D>;
  constexpr int kBytes = sizeof(Memory<T, D>), kStage = sizeof(typename Memory<T, D>::Stage);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), kName);
  const dim3 grid(static_cast<unsigned>(g.tiles), static_cast<unsigned>(p.step.sequences * p.step.key_heads),
                  g.split ? static_cast<unsigned>(p.step.capacity / kChunk + 2 * g.rows) : 1u);
  const unsigned shared = g.split ? kBytes - kStage : kBytes;
  launch(ctx, kName, {.grid = grid, .block = kThreads, .dependent = true, .shared = shared}, kernel, p);
}

struct Partials {
  Tensor statistics, values;
};
// The memory is free again at once: what comes next in the stream may have it.
Partials allocate(const Context& ctx, int64_t queries, const Grid& g, int64_t width) {
  if (!g.split) return {};
  ArenaScope scope(*ctx.scratch);
  return {ctx.scratch->allocate("chunk statistics", DType::f32, {queries * g.chunks, 2}),
          ctx.scratch->allocate("chunk values", DType::f32, {queries * g.chunks, width})};
}

template <typename T>
void run(const Context& ctx, const DecodeCall& call, const Grid& g, const Partials& partials) {
  const Tiles<T> p{.step = step_of<T>(call),
                   .group = static_cast<int>(call.q.dim(1) / call.k.dim(1)),
                   .rows = g.rows,
                   .parts = g.parts,
                   .row_queries = g.row_queries,
                   .chunks = g.chunks,
                   .split = g.split,
                   .statistics = static_cast<float2*>(partials.statistics.data),
                   .values = static_cast<float*>(partials.values.data)};
  if (p.step.width == 32) return launch_tiles<T, 32>(ctx, p, g);
  if (p.step.width == 64) return launch_tiles<T, 64>(ctx, p, g);
  launch_tiles<T, 128>(ctx, p, g);
}

bool eligible(const DecodeCall& c) {
  const int64_t width = c.q.dim(2);
  if (c.q.dtype == DType::f32 || (width != 32 && width != 64 && width != 128)) return false;
  for (const Tensor* x : {&c.q, &c.k, &c.v, &c.o, &c.cache_k, &c.cache_v})
    if (reinterpret_cast<uintptr_t>(x->data) % 16 != 0 || x->row_stride % 8 != 0) return false;
  return true;
}

}  // namespace

bool softmax_decode_tiles(const Context& ctx, const DecodeCall& call) {
  if (!eligible(call)) return false;
  const int64_t rows = call.q.rows(), heads = call.q.dim(1), key_heads = call.k.dim(1);
  const auto grid = [&](int64_t n) {
    Grid g = grid_of(heads / key_heads, n, call.cache_k.dim(1), call.cache_k.rows() * key_heads);
    g.split = g.split && ctx.scratch;
    return g;
  };
  if (ctx.rehearsal) {
    // Fewer rows than rehearsed may need more, where only they are split.
    for (int64_t n = 1; n <= rows; ++n) allocate(ctx, n * heads, grid(n), call.q.dim(2));
    return true;
  }
  const Grid g = grid(rows);
  const Partials partials = allocate(ctx, rows * heads, g, call.q.dim(2));
  call.q.dtype == DType::f16 ? run<__half>(ctx, call, g, partials)
                             : run<__nv_bfloat16>(ctx, call, g, partials);
  return true;
}

}  // namespace kernels::cuda

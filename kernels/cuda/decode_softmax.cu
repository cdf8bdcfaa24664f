// Decoding with a cache on tensor cores: fp16 and bf16, head sizes 32, 64 and 128. A tile is up to 16 queries
// of one key head, whole rows where they fit, and belongs to a cluster of blocks. A warp with a stage takes
// the chunks of committed slots of one class for all of the tile's queries. Each block has a share of the
// queries: its warps, first those that have no full chunk, take the last chunks of their rows, which hold the
// rows' own ancestors and are gathered in shared memory; and it puts their partial results together, read of
// the cluster's blocks. Where there are fewer stages than classes with chunks, this goes round by round. What
// the cache holds is fetched, and addresses are worked out, while the kernel ahead still runs.
#include <algorithm>

#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/decode_tiles.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/ops/linear.h"

namespace kernels::cuda {

namespace {

constexpr int kMostStages = 4, kMostShift = 3;
// Blocks that the registers of a multiprocessor are to have room for: the kernels around have blocks there
// too.
template <int D>
constexpr int kResident = D == 128 ? 1 : 2;

// A chunk in shared memory: its places, 0 where there is no chunk, and this lane's rows of each step.
struct Chunk {
  int visible;
  uint32_t keys[kSteps], values[kSteps];
};
// One of the two last chunks of one of the block's rows.
struct LastChunk : Chunk {
  int item, row, which;
};

// Where the chunk's places lie in the pool.
template <int D>
__device__ __forceinline__ void find_places(const Layout& at, const Tile& t, uint64_t ancestors,
                                            LastChunk& chunk) {
  auto* rows = reinterpret_cast<uint8_t*>(block_memory + at.rows) + t.warp * kChunk;
  const int begin = (t.full + chunk.which) * kChunk;
#pragma unroll
  for (int place = t.lane; place < kChunk; place += 32)
    rows[place] = static_cast<uint8_t>(begin + place < t.length ? place : kZeros);
  __syncwarp();
#pragma unroll
  for (int bit = t.lane; bit < kChunk; bit += 32) {
    const int place = t.length + __popcll(ancestors & ((uint64_t{1} << bit) - 1)) - begin;
    if ((ancestors >> bit & 1) && place >= 0 && place < kChunk)
      rows[place] = static_cast<uint8_t>(kChunk + bit);
  }
  __syncwarp();
  const uint32_t pool = shared_address(block_memory + at.pool);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    chunk.keys[step] = pool + rows[step * 16 + key_row()] * kRowBytes<D> + key_column();
    chunk.values[step] = pool + at.apart + rows[step * 16 + value_row()] * kRowBytes<D> + value_column();
  }
  __syncwarp();
}

// This warp's first last chunk from `item` on: every row's first, then every row's second, dealt to the warps
// in turn. Lane i has the ancestors of row i.
template <typename T, int D>
__device__ __forceinline__ LastChunk find_last(const Tiles<T>& p, const Tile& t, uint64_t ancestors,
                                               int item) {
#pragma unroll 1
  for (; item < 2 * t.own_rows; item += kWarps) {
    LastChunk chunk{};
    chunk.item = chunk.row = item;
    if (item >= t.own_rows) chunk.row -= t.own_rows, chunk.which = 1;
    const uint64_t mask = __shfl_sync(0xffffffffu, ancestors, chunk.row);
    const int places = t.length + __popcll(mask);
    chunk.visible = min(places - (t.full + chunk.which) * kChunk, kChunk);
    if (chunk.visible <= 0) continue;
    find_places<D>(p.at, t, mask, chunk);
    return chunk;
  }
  return {};
}

template <typename T, int D>
__device__ __forceinline__ void store_last(const Tiles<T>& p, const Tile& t, const LastChunk& chunk,
                                           const Partial<D>& x) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = t.lane / 4 + 8 * half, i = query - t.mine;
    if (row_of(p, query) == t.own_row + chunk.row && i >= 0 && i < t.queries)
      store_result<D>(x, half, last_result<D>(p.at, i, chunk.which));
  }
}

// The chunk in this warp's stage.
template <int D>
__device__ __forceinline__ Chunk staged_chunk(const Layout& at, int warp) {
  const uint32_t stage = shared_address(stage_of<D>(at, warp)),
                 keys = stage + key_row() * kRowBytes<D> + key_column(),
                 values = stage + (kChunk + value_row()) * kRowBytes<D> + value_column();
  Chunk chunk{.visible = kChunk};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    chunk.keys[step] = keys + step * 16 * kRowBytes<D>;
    chunk.values[step] = values + step * 16 * kRowBytes<D>;
  }
  return chunk;
}

// The further chunks of a class, from `chunk` on.
template <typename T, int D>
__device__ __forceinline__ void take_more(const Tiles<T>& p, const Tile& t, uint32_t queries, int chunk,
                                          Partial<D>& state) {
  const Chunk now = staged_chunk<D>(p.at, t.warp);
  load_keys<T, D>(p, t, chunk);
  load_values<T, D>(p, t, chunk);
#pragma unroll 1
  for (; chunk < t.full; chunk += kClasses) {
    wait_for_copies<1>();
    __syncwarp();
    const Weights w = weigh<T, D>(queries, now.keys, p.step.scale, kChunk);
    __syncwarp();
    load_keys<T, D>(p, t, chunk + kClasses);
    wait_for_copies<1>();
    __syncwarp();
    const Partial<D> x = weighted_sum<T, D>(w, now.values, kChunk);
    __syncwarp();
    load_values<T, D>(p, t, chunk + kClasses);
    take(state, x);
  }
}

// This warp's last chunks from `now` on, if there are any, then its class's full chunks, of which the first
// is in the warp's stage and is `now` otherwise; the class's result takes their place. One loop for the last
// chunks and the first full one: short code is fetched sooner.
template <typename T, int D>
__device__ __forceinline__ void take_chunks(const Tiles<T>& p, const Tile& t, uint64_t ancestors,
                                            LastChunk now, bool lasts, int first) {
  const uint32_t queries = shared_address(block_memory) + value_row() * kRowBytes<D> + value_column();
  if (!lasts && first >= t.full) return;
  Partial<D> state;
#pragma unroll 1
  for (;;) {
    state = weighted_sum<T, D>(weigh<T, D>(queries, now.keys, p.step.scale, now.visible), now.values,
                               now.visible);
    __syncwarp();
    if (!lasts) break;
    store_last<T, D>(p, t, now, state);
    now = find_last<T, D>(p, t, ancestors, now.item + kWarps);
    lasts = now.visible > 0;
    if (lasts) continue;
    if (first >= t.full) return;
    static_cast<Chunk&>(now) = staged_chunk<D>(p.at, t.warp);
  }
  if (first + kClasses < t.full) take_more<T, D>(p, t, queries, first + kClasses, state);
  auto* stage = reinterpret_cast<float*>(stage_of<D>(p.at, t.warp));
#pragma unroll
  for (int half = 0; half < 2; ++half)
    store_result<D>(state, half, stage + (t.lane / 4 + 8 * half) * kResult<D>);
}

// One thread's share of putting results together: two columns of the block's query i.
template <typename T, int D>
struct Finish {
  int unit, chunks;  // chunks: of the query's row, 0 where there is none
  T* to;

  // Called by whole warps, whose lanes have the ancestors of the block's rows.
  __device__ __forceinline__ Finish(const Tiles<T>& p, const Tile& t, uint64_t ancestors, int unit)
      : unit(unit) {
    int row, head;
    const bool inside = find_query(p, t, t.mine + i(), row, head) && i() < t.queries;
    const uint64_t mask = __shfl_sync(0xffffffffu, ancestors, row - t.own_row);
    chunks = inside ? (t.length + __popcll(mask) + kChunk - 1) / kChunk : 0;
    to = p.step.o + (t.first + t.row + row) * p.step.o_stride + head * D + column();
  }
  __device__ __forceinline__ int i() const { return unit / (D / 2); }
  __device__ __forceinline__ int column() const { return unit % (D / 2) * 2; }
  // The query's result in this block's first stage.
  __device__ __forceinline__ uint32_t mine(const Tiles<T>& p, const Tile& t) const {
    return shared_address(block_memory + p.at.stages) + (t.mine + i()) * kResult<D> * 4;
  }
  __device__ __forceinline__ Columns load(uint32_t result) const {
    const float2 state = load_cluster(result + D * 4), out = load_cluster(result + column() * 4);
    return {state.x, state.y, out};
  }
  __device__ __forceinline__ Columns load_last(const Tiles<T>& p, int which) const {
    const float* result = last_result<D>(p.at, i(), which);
    const float2 state = *reinterpret_cast<const float2*>(result + D);
    return {state.x, state.y, *reinterpret_cast<const float2*>(result + column())};
  }

  // Takes the classes [low, end), which have full chunks, out of this round's stages. Behind the loads there
  // are no branches, so that one weight need not wait for another.
  __device__ __forceinline__ void take_classes(const Tiles<T>& p, const uint32_t (&from)[kAhead], int low,
                                               int end, Columns& total) const {
#pragma unroll 1
    for (int first = low; first < end; first += kAhead) {
      const uint32_t behind = ((first - low) >> p.shift) * kStageBytes<D>;
      Columns x[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) x[j] = load(from[j] + behind);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        Columns next = total;
        next.take(x[j]);
        if (first + j < end) total = next;
      }
    }
  }
  // The same for a row with more chunks than classes: last chunks may follow in a class.
  __device__ __forceinline__ void take_long_classes(const Tiles<T>& p, const Tile& t, int low, int end,
                                                    Columns& total) const {
#pragma unroll 1
    for (int c = low; c < end; ++c) {
      const int place = c - low, rank = place & ((1 << p.shift) - 1);
      Columns x = load(cluster_address(mine(p, t), rank) + (place >> p.shift) * kStageBytes<D>);
#pragma unroll 1
      for (int chunk = t.full; chunk < chunks; ++chunk)
        if (chunk % kClasses == c) x.take(load_last(p, chunk - t.full));
      total.take(x);
    }
  }
  // What a round adds; behind the last round the result is complete.
  __device__ __forceinline__ void take_round(const Tiles<T>& p, const Tile& t, const uint32_t (&from)[kAhead],
                                             int low, int end, bool last) const {
    auto* kept = reinterpret_cast<float4*>(block_memory + p.at.totals) + unit;
    Columns total;
    if (low > 0) total = {kept->x, kept->y, {kept->z, kept->w}};
    if (chunks <= kClasses)
      take_classes(p, from, low, min(end, t.full), total);
    else
      take_long_classes(p, t, low, min(end, min(t.full, kClasses)), total);
    if (!last) {
      *kept = {total.maximum, total.sum, total.out.x, total.out.y};
      return;
    }
#pragma unroll 1
    for (int chunk = t.full; chunk < min(chunks, kClasses); ++chunk) total.take(load_last(p, chunk - t.full));
    const float factor = reciprocal(total.sum);
    *reinterpret_cast<uint32_t*>(to) =
        pack<T>(__fmul_rn(total.out.x, factor), __fmul_rn(total.out.y, factor));
  }
};

template <typename T, int D>
__device__ __forceinline__ void take_rounds(const Tiles<T>& p, const Tile& t, uint64_t ancestors,
                                            LastChunk now, bool lasts) {
  const int classes = p.stages << p.shift, filled = min(t.full, kClasses), units = t.queries * D / 2;
  int mine = class_of(p, t);
  for (int low = 0;; low += classes, mine += classes) {
    const int end = low + classes;
    take_chunks<T, D>(p, t, ancestors, now, lasts, mine);
    cluster_arrive_shared();
#pragma unroll 1
    for (int first = 0; first < units; first += kThreads) {
      // Warps that have least to do otherwise begin.
      const int thread = static_cast<int>(threadIdx.x) ^ (kThreads - 32);
      const Finish<T, D> finish(p, t, ancestors, first + thread);
      uint32_t from[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) from[j] = cluster_address(finish.mine(p, t) + p.ahead[j], p.rank[j]);
      if (first == 0) cluster_wait();
      if (finish.chunks > 0) finish.take_round(p, t, from, low, end, end >= filled);
    }
    if (end >= filled) break;
    cluster_sync_shared();  // before results are overwritten
    now = {staged_chunk<D>(p.at, t.warp)}, lasts = false;
    load_keys<T, D>(p, t, mine + classes);
    load_values<T, D>(p, t, mine + classes);
    wait_for_copies<0>();
    __syncwarp();
  }
  if (p.shift > 0) cluster_leave();
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, kResident<D>) softmax_decode_kernel(const Tiles<T> p) {
  let_next_start();
  if (static_cast<int>(blockIdx.y) >= p.step.sequences * p.step.key_heads) return wait_for_previous();
  const Tile t = tile_of(p);
  if (t.rows <= 0) return;
  uint64_t ancestors = 0;
  if (t.lane < t.own_rows)
    ancestors = static_cast<uint64_t>(p.step.ancestors[t.first + t.row + t.own_row + t.lane]);
  const int mine = class_of(p, t);
  load_keys<T, D>(p, t, mine);
  load_values<T, D>(p, t, mine);
  load_stored_pool<T, D>(p, t);
  // Warps without a full chunk are the first to take last chunks.
  const int busy = min((t.full - t.rank + (1 << p.shift) - 1) >> p.shift, p.stages);
  LastChunk now = find_last<T, D>(p, t, ancestors, (t.warp - busy) & (kWarps - 1));
  const bool lasts = now.visible > 0;
  if (!lasts) static_cast<Chunk&>(now) = staged_chunk<D>(p.at, t.warp);
  NewRows<T, D> fresh(p, t);
  wait_for_previous();
  fresh.load(p);
  wait_for_copies<0>();
  __syncthreads();
  append_rows<T, D>(p, t);
  take_rounds<T, D>(p, t, ancestors, now, lasts);
}

// Tiles of a step, `rows` rows being the most that one sequence can have among them.
struct Grid {
  int rows, parts, row_queries, stages, shift;
  int64_t tiles;
  Layout at;
};

// As many blocks of a tile as have something to do, and are resident at once with those of all tiles.
void share_tiles(Grid& g, int chunks, int width, int rows, int64_t all_tiles) {
  const int wanted = std::max((chunks + g.stages - 1) / g.stages, (g.rows + g.stages - 1) / g.stages);
  const auto lay_out = [&](int shift) {
    return layout_of(width, g.stages, kQueries >> shift, rows, chunks > g.stages << shift);
  };
  const auto resident = [&](int shift) {
    const bool two = 2 * (lay_out(shift).bytes + kReservedShared) <= shared_memory_limit() + kReservedShared;
    return all_tiles << shift <= (two ? 2 : 1) * multiprocessors();
  };
  g.shift = 0;
  while (has_clusters() && g.shift < kMostShift && 1 << g.shift < wanted && resident(g.shift + 1)) ++g.shift;
  g.at = lay_out(g.shift);
}

Grid grid_of(int64_t group, int64_t rows, int64_t capacity, int64_t width, int64_t key_heads) {
  Grid g;
  g.row_queries = static_cast<int>(std::min<int64_t>(group, kQueries));
  g.parts = static_cast<int>((group + kQueries - 1) / kQueries);
  const int64_t most = std::min(rows, kMaxDecodeRows);
  g.rows = static_cast<int>(std::min<int64_t>(kQueries / g.row_queries, most));
  g.tiles = (most + g.rows - 1) / g.rows * g.parts;
  for (g.stages = kMostStages;; g.stages /= 2) {
    share_tiles(g, static_cast<int>(capacity / kChunk), static_cast<int>(width), static_cast<int>(most),
                g.tiles * key_heads);
    if (g.at.bytes <= shared_memory_limit() || g.stages == 1) return g;
  }
}

// Blocks along y that hold places only. Two of the kernel behind would stand together on a multiprocessor
// that has no block of this one, and keep those behind them out. That matters where that kernel has a block
// for nearly every multiprocessor: beyond 16 rows of one sequence.
int64_t idle_blocks(const Grid& g, int64_t busy) {
  const int64_t across = g.tiles << g.shift;
  return g.tiles > g.parts ? std::max<int64_t>(multiprocessors() / across - busy, 0) : 0;
}

template <typename T, int D>
void launch_tiles(const Context& ctx, Tiles<T> p, const Grid& g) {
  constexpr const char* kName = "softmax_attention_decode";
  const auto kernel = softmax_decode_kernel<T, D>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.at.bytes), kName);
  for (int i = 0; i < kAhead; ++i) {
    const int place = std::min(i, (g.stages << g.shift) - 1);
    p.rank[i] = place & ((1 << g.shift) - 1), p.ahead[i] = (place >> g.shift) * kStageBytes<D>;
  }
  const int64_t busy = p.step.sequences * p.step.key_heads;
  const dim3 grid(static_cast<unsigned>(g.tiles << g.shift),
                  static_cast<unsigned>(busy + idle_blocks(g, busy)));
  launch(ctx, kName,
         {.grid = grid,
          .block = dim3(kThreads),
          .cluster = 1u << g.shift,
          .dependent = true,
          .shared = static_cast<unsigned>(p.at.bytes)},
         kernel, p);
}

template <typename T>
void run(const Context& ctx, const DecodeCall& call, const Grid& g) {
  const Tiles<T> p{.step = step_of<T>(call),
                   .group = static_cast<int>(call.q.dim(1) / call.k.dim(1)),
                   .rows = g.rows,
                   .parts = g.parts,
                   .row_queries = g.row_queries,
                   .row_factor = (65536 + g.row_queries - 1) / g.row_queries,
                   .shift = g.shift,
                   .stages = g.stages,
                   .at = g.at,
                   .rank = {},
                   .ahead = {}};
  if (p.step.width == 32) return launch_tiles<T, 32>(ctx, p, g);
  if (p.step.width == 64) return launch_tiles<T, 64>(ctx, p, g);
  launch_tiles<T, 128>(ctx, p, g);
}

// Whatever the number of rows: results must not depend on it.
bool eligible(const DecodeCall& c) {
  const int64_t width = c.q.dim(2);
  if (c.q.dtype == DType::f32 || (width != 32 && width != 64 && width != 128)) return false;
  for (const Tensor* x : {&c.q, &c.k, &c.v, &c.o, &c.cache_k, &c.cache_v})
    if (reinterpret_cast<uintptr_t>(x->data) % 16 != 0 || x->row_stride % 8 != 0) return false;
  return layout_of(static_cast<int>(width), 1, kQueries, kMaxDecodeRows, true).bytes <= shared_memory_limit();
}

}  // namespace

bool softmax_decode_tiles(const Context& ctx, const DecodeCall& call) {
  if (!eligible(call)) return false;
  if (ctx.rehearsal) return true;
  const Grid g = grid_of(call.q.dim(1) / call.k.dim(1), call.q.rows(), call.cache_k.dim(1), call.q.dim(2),
                         call.cache_k.rows() * call.k.dim(1));
  call.q.dtype == DType::f16 ? run<__half>(ctx, call, g) : run<__nv_bfloat16>(ctx, call, g);
  return true;
}

}  // namespace kernels::cuda

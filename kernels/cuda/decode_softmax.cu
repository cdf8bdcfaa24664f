// Decoding with a cache on tensor cores: fp16 and bf16, head sizes 32, 64 and 128. A tile is up to 16 queries
// of one key head, whole rows where they fit, and belongs to a cluster of blocks. A warp takes the chunks of
// committed slots of one class for all of the tile's queries. Each block has a share of the queries: its
// warps take the last chunks of their rows, which hold the rows' own ancestors and are gathered in shared
// memory; and it puts their partial results together, read of the cluster's blocks. Where there are fewer
// warps than classes with chunks, this goes round by round. What the cache holds is fetched while the kernel
// ahead still runs.
#include <algorithm>

#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/decode_chunk.cuh"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/ops/linear.h"

namespace kernels::cuda {

namespace {

constexpr int kMostWarps = 4, kMostShift = 3;
constexpr int kAhead = 8;  // partial results that are fetched at once

// Byte offsets in a block's shared memory; queries come first. The pool has keys and values of the committed
// slots behind the last full chunk, a row of zeros at kZeros, the step's own rows from kChunk on.
constexpr int kZeros = kChunk - 1;
struct Layout {
  int results;      // (queries of the block, 2, kResult) floats: of the last chunks
  int places;       // (queries of the block) int: places of a row's list
  int rows;         // (warps, kChunk) bytes: rows of the pool
  int pool, apart;  // apart: of a row's key and its value
  int stages;       // (warps): keys, values of a chunk; then (16, kResult) floats: of a class
  int totals;       // (queries of the block, D / 2) float4, where there are several rounds
  int bytes;
};
Layout layout_of(int width, int warps, int queries, int rows, bool rounds) {
  const int row = (width + 8) * 2, result = (width + 8) * 4;
  Layout l{};
  l.results = kQueries * row;
  l.places = l.results + queries * 2 * result;
  l.rows = l.places + kQueries * 4;
  l.pool = l.rows + warps * kChunk;
  l.apart = (kChunk + rows) * row;
  l.stages = l.pool + 2 * l.apart;
  l.totals = l.stages + warps * 2 * kChunk * row;
  l.bytes = l.totals + (rounds ? queries * width * 8 : 0);
  return l;
}

template <typename T>
struct Tiles {
  SoftmaxDecode<T> step;
  int group;        // queries of a row: H / Hk
  int rows, parts;  // of a tile: rows; tiles that a row's queries take
  int row_queries;  // queries of one row in a tile
  int row_factor;   // 2^16 / row_queries, rounded up
  int shift;        // a cluster has 2^shift blocks
  Layout at;
};

// blockIdx.x is the tile of a sequence's key head and the block of its cluster, y the sequence and key head.
struct Tile {
  int sequence, key_head, first, length, full;  // full: chunks of committed slots only
  int row, rows, query;                         // first row, rows, first query of a row
  int rank, mine, queries, own_row, own_rows;   // this block's share: queries, rows that have some of them
  int warps, warp, lane;
};

// The row of query i of a tile: i / row_queries.
template <typename T>
__device__ __forceinline__ int row_of(const Tiles<T>& p, int i) {
  return i * p.row_factor >> 16;
}

template <typename T>
__device__ Tile tile_of(const Tiles<T>& p) {
  Tile t;
  const int tile = static_cast<int>(blockIdx.x) >> p.shift;
  t.sequence = blockIdx.y / p.step.key_heads;
  t.key_head = blockIdx.y % p.step.key_heads;
  t.first = p.step.first_row[t.sequence];
  const int count = min(p.step.first_row[t.sequence + 1] - t.first, int{kMaxDecodeRows});
  t.length = p.step.length(t.sequence);
  t.full = t.length / kChunk;
  t.row = tile / p.parts * p.rows;
  t.rows = min(p.rows, count - t.row);
  t.query = tile % p.parts * kQueries;
  t.rank = blockIdx.x & ((1 << p.shift) - 1);
  t.queries = kQueries >> p.shift;
  t.mine = t.rank * t.queries;
  t.own_row = row_of(p, t.mine);
  t.own_rows = max(min(row_of(p, t.mine + t.queries - 1) + 1, t.rows) - t.own_row, 0);
  t.warps = blockDim.x / 32, t.warp = threadIdx.x / 32, t.lane = threadIdx.x % 32;
  return t;
}

// Query i of the tile: its row within the tile and its head; false where there is none.
template <typename T>
__device__ bool find_query(const Tiles<T>& p, const Tile& t, int i, int& row, int& head) {
  row = row_of(p, i);
  const int member = t.query + i - row * p.row_queries;
  head = t.key_head * p.group + member;
  return row < t.rows && member < p.group;
}

extern __shared__ __align__(16) char memory[];

__device__ __forceinline__ int* list_places(const Layout& at) {
  return reinterpret_cast<int*>(memory + at.places);
}
template <int D>
__device__ __forceinline__ char* stage_of(const Layout& at, int warp) {
  return memory + at.stages + warp * 2 * kChunk * kRowBytes<D>;
}
// The result of the block's query i for the first or second of the last chunks.
template <int D>
__device__ __forceinline__ float* last_result(const Layout& at, int i, int which) {
  return reinterpret_cast<float*>(memory + at.results) + (i * 2 + which) * kResult<D>;
}

// Rows of one head, by thread `i` of `threads`, a multiple of 32.
template <typename T, int D>
__device__ __forceinline__ void load_rows(const T* from, int64_t stride, int rows, uint32_t to, int i,
                                          int threads) {
  constexpr int kUnits = D / 8;
  int row = i / kUnits;
  from += row * stride + i % kUnits * 8;
  to += row * kRowBytes<D> + i % kUnits * 16;
  const int step = threads / kUnits;
#pragma unroll 1
  for (; row < rows; row += step) {
    copy_unit(to, from, true);
    from += step * stride;
    to += step * kRowBytes<D>;
  }
}
template <typename T, int D>
__device__ __forceinline__ void load_stored(const Tiles<T>& p, const Tile& t, const T* cache,
                                            int64_t cache_stride, int slot, int rows, uint32_t to, int i,
                                            int threads) {
  const T* from =
      cache + t.sequence * cache_stride + (int64_t{slot} * p.step.key_heads + t.key_head) * int64_t{D};
  load_rows<T, D>(from, int64_t{p.step.key_heads} * D, rows, to, i, threads);
}

// A full chunk's keys or values, by this warp to its stage; nothing where there is no such chunk.
template <typename T, int D>
__device__ __forceinline__ void load_keys(const Tiles<T>& p, const Tile& t, int chunk) {
  if (chunk < t.full)
    load_stored<T, D>(p, t, p.step.cache_k, p.step.cache_k_stride, chunk * kChunk, kChunk,
                      shared_address(stage_of<D>(p.at, t.warp)), t.lane, 32);
  end_copies();
}
template <typename T, int D>
__device__ __forceinline__ void load_values(const Tiles<T>& p, const Tile& t, int chunk) {
  if (chunk < t.full)
    load_stored<T, D>(p, t, p.step.cache_v, p.step.cache_v_stride, chunk * kChunk, kChunk,
                      shared_address(stage_of<D>(p.at, t.warp)) + kChunk * kRowBytes<D>, t.lane, 32);
  end_copies();
}

// The pool's stored slots and its zeros; then what the kernel ahead has made: queries, and the step's rows up
// to the last one that this block's rows may see.
template <typename T, int D>
__device__ void load_stored_pool(const Tiles<T>& p, const Tile& t) {
  if (t.own_rows == 0) return;
  const uint32_t pool = shared_address(memory + p.at.pool);
  const int i = threadIdx.x, threads = blockDim.x, slot = t.full * kChunk;
  load_stored<T, D>(p, t, p.step.cache_k, p.step.cache_k_stride, slot, t.length - slot, pool, i, threads);
  load_stored<T, D>(p, t, p.step.cache_v, p.step.cache_v_stride, slot, t.length - slot, pool + p.at.apart, i,
                    threads);
  if (i < D / 4)
    copy_unit(pool + (i < D / 8 ? 0 : p.at.apart) + kZeros * kRowBytes<D> + i % (D / 8) * 16, p.step.cache_k,
              false);
}
template <typename T, int D>
__device__ void load_new(const Tiles<T>& p, const Tile& t) {
  const int threads = blockDim.x;
  for (int i = threadIdx.x; i < kQueries * D / 8; i += threads) {
    const int query = i / (D / 8), unit = i % (D / 8);
    int row, head;
    const bool inside = find_query(p, t, query, row, head);
    const T* from = p.step.q + (inside ? (t.first + t.row + row) * p.step.q_stride + head * D : 0) + unit * 8;
    copy_unit(shared_address(memory) + query * kRowBytes<D> + unit * 16, from, inside);
  }
  if (t.own_rows > 0) {
    const uint32_t to = shared_address(memory + p.at.pool) + kChunk * kRowBytes<D>;
    const int rows = t.row + t.own_row + t.own_rows, column = t.key_head * D;
    load_rows<T, D>(p.step.k + t.first * p.step.k_stride + column, p.step.k_stride, rows, to, threadIdx.x,
                    threads);
    load_rows<T, D>(p.step.v + t.first * p.step.v_stride + column, p.step.v_stride, rows, to + p.at.apart,
                    threadIdx.x, threads);
  }
  end_copies();
}

// The new rows of which this block has the first query go into their slots.
template <typename T, int D>
__device__ void append_rows(const Tiles<T>& p, const Tile& t) {
  constexpr int kUnits = D / 8;
  if (t.query != 0) return;
  for (int i = threadIdx.x; i < t.own_rows * kUnits; i += blockDim.x) {
    const int row = t.own_row + i / kUnits, unit = i % kUnits, slot = t.length + t.row + row;
    if (row * p.row_queries < t.mine || slot >= p.step.capacity) continue;
    const char* from = memory + p.at.pool + (kChunk + t.row + row) * kRowBytes<D> + unit * 16;
    const int64_t to = (int64_t{slot} * p.step.key_heads + t.key_head) * D + unit * 8;
    *reinterpret_cast<uint4*>(p.step.cache_k + t.sequence * p.step.cache_k_stride + to) =
        *reinterpret_cast<const uint4*>(from);
    *reinterpret_cast<uint4*>(p.step.cache_v + t.sequence * p.step.cache_v_stride + to) =
        *reinterpret_cast<const uint4*>(from + p.at.apart);
  }
}

// One of the two last chunks of one of the block's rows.
struct LastChunk {
  int item, row, which;
  int visible;       // places of the chunk; 0: there is no such chunk
  int rows[kSteps];  // of the pool: this lane's place of each step
};

// Where the chunk's places lie in the pool.
__device__ __forceinline__ void find_places(const Layout& at, const Tile& t, uint64_t ancestors,
                                            LastChunk& chunk) {
  auto* rows = reinterpret_cast<uint8_t*>(memory + at.rows) + t.warp * kChunk;
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
#pragma unroll
  for (int step = 0; step < kSteps; ++step) chunk.rows[step] = rows[step * 16 + t.lane % 16];
  __syncwarp();
}

// The next last chunk behind `item` that is this warp's: every row's first, then every row's second, dealt
// out forth and back to the warps, first to those that have no full chunk. Lane i has the ancestors of row i.
template <typename T>
__device__ LastChunk next_last(const Tiles<T>& p, const Tile& t, uint64_t ancestors, int item) {
  const int busy = min((t.full - t.rank + (1 << p.shift) - 1) >> p.shift, t.warps);
  while (++item < 2 * t.own_rows) {
    const int turn = busy + item, place = turn & (t.warps - 1);
    if ((turn & t.warps ? t.warps - 1 - place : place) != t.warp) continue;
    LastChunk chunk{.item = item, .row = item, .which = 0};
    if (item >= t.own_rows) chunk.row -= t.own_rows, chunk.which = 1;
    const uint64_t mask = __shfl_sync(0xffffffffu, ancestors, chunk.row);
    const int places = t.length + __popcll(mask);
    chunk.visible = min(places - (t.full + chunk.which) * kChunk, kChunk);
    if (chunk.visible <= 0) continue;
    find_places(p.at, t, mask, chunk);
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

// This warp's last chunks, in the first round, then its class's full chunks, of which the first is in the
// warp's stage or on its way there; the class's result takes their place. One loop for both: short code is
// fetched sooner.
template <typename T, int D>
__device__ __forceinline__ void take_chunks(const Tiles<T>& p, const Tile& t, uint64_t ancestors, int first,
                                            bool first_round) {
  char* stage = stage_of<D>(p.at, t.warp);
  const uint32_t queries = lane_part(shared_address(memory) + t.lane % 16 * kRowBytes<D>);
  LastChunk last{.item = -1};
  Partial<D> state;
  bool lasts = first_round, waiting = first_round;
#pragma unroll 1
  for (int chunk = first;;) {
    if (lasts) {
      last = next_last(p, t, ancestors, last.item);
      lasts = last.visible > 0;
    }
    if (waiting) {
      wait_for_copies<0>();
      __syncthreads();
      append_rows<T, D>(p, t);
      waiting = false;
    }
    if (!lasts && chunk >= t.full) break;
    uint32_t keys[kSteps], values[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int row = lasts ? last.rows[step] : step * 16 + t.lane % 16;
      keys[step] = lane_part(shared_address(lasts ? memory + p.at.pool : stage) + row * kRowBytes<D>);
      values[step] = keys[step] + (lasts ? p.at.apart : kChunk * kRowBytes<D>);
    }
    const int visible = lasts ? last.visible : kChunk;
    if (!lasts) wait_for_copies<1>();
    __syncwarp();
    const Weights w = weigh<T, D>(queries, keys, p.step.scale, visible);
    __syncwarp();
    if (!lasts) {
      load_keys<T, D>(p, t, chunk + kClasses);
      wait_for_copies<1>();
    }
    __syncwarp();
    const Partial<D> x = weighted_sum<T, D>(w, values, visible);
    __syncwarp();
    if (lasts) {
      store_last<T, D>(p, t, last, x);
      continue;
    }
    load_values<T, D>(p, t, chunk + kClasses);
    if (chunk == first)
      state = x;
    else
      take(state, x);
    chunk += kClasses;
  }
  if (first >= t.full) return;
#pragma unroll
  for (int half = 0; half < 2; ++half)
    store_result<D>(state, half, reinterpret_cast<float*>(stage) + (t.lane / 4 + 8 * half) * kResult<D>);
}

// A query's way to its result: the block's query i, two columns from `column` on, `chunks` in its list.
struct Sum {
  int i, column, chunks;
  Columns total;
};

// Takes the classes [low, end), which have full chunks, out of the stages of this round, kBatch at a time. A
// last chunk may follow in the same class, and then kBatch is 1.
template <int D, int kBatch>
__device__ __forceinline__ void take_classes(const Layout& at, const Tile& t, int shift, int low, int end,
                                             Sum& sum) {
#pragma unroll 1
  for (int first = low; first < end; first += kBatch) {
    Columns x[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int c = first + j, warp = (c - low) >> shift, rank = c & ((1 << shift) - 1);
      const auto* stage = reinterpret_cast<const float*>(stage_of<D>(at, warp));
      if (c < end)
        x[j] = load_result<D>(cluster_shared(stage, rank) + (t.mine + sum.i) * kResult<D>, sum.column);
    }
    if constexpr (kBatch == 1)
      for (int which = 0; which < 2; ++which)
        if (t.full + which < sum.chunks && t.full + which > first && (t.full + which) % kClasses == first)
          x[0].take(load_result<D>(last_result<D>(at, sum.i, which), sum.column));
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
      if (first + j < end) sum.total.take(x[j]);
  }
}

// What the round of the classes [low, end) adds to the results of this block's queries; behind the last round
// they are complete.
template <typename T, int D>
__device__ void finish_round(const Tiles<T>& p, const Tile& t, int low, int end, bool last) {
  for (int u = threadIdx.x; u < t.queries * D / 2; u += blockDim.x) {
    Sum sum{.i = u / (D / 2), .column = u % (D / 2) * 2};
    int row, head;
    if (!find_query(p, t, t.mine + sum.i, row, head)) continue;
    sum.chunks = (list_places(p.at)[row - t.own_row] + kChunk - 1) / kChunk;
    auto* kept = reinterpret_cast<float4*>(memory + p.at.totals) + u;
    if (low > 0) sum.total = {kept->x, kept->y, {kept->z, kept->w}};
    if (sum.chunks <= kClasses)
      take_classes<D, kAhead>(p.at, t, p.shift, low, min(end, t.full), sum);
    else
      take_classes<D, 1>(p.at, t, p.shift, low, min(end, min(t.full, kClasses)), sum);
    if (!last) {
      *kept = {sum.total.maximum, sum.total.sum, sum.total.out.x, sum.total.out.y};
      continue;
    }
    for (int chunk = t.full; chunk < min(sum.chunks, kClasses); ++chunk)
      sum.total.take(load_result<D>(last_result<D>(p.at, sum.i, chunk - t.full), sum.column));
    const float factor = __frcp_rn(sum.total.sum);
    T* to = p.step.o + (t.first + t.row + row) * p.step.o_stride + head * D + sum.column;
    *reinterpret_cast<uint32_t*>(to) =
        pack<T>(__fmul_rn(sum.total.out.x, factor), __fmul_rn(sum.total.out.y, factor));
  }
}

template <typename T, int D>
__device__ void take_rounds(const Tiles<T>& p, const Tile& t, uint64_t ancestors) {
  const auto sync = [&] {
    if (p.shift > 0)
      cluster_sync_shared();
    else
      __syncthreads();
  };
  const int classes = t.warps << p.shift, filled = min(t.full, kClasses);
  int mine = (t.warp << p.shift) + t.rank;
  for (int low = 0;; low += classes, mine += classes) {
    const int end = low + classes;
    take_chunks<T, D>(p, t, ancestors, mine, low == 0);
    sync();
    finish_round<T, D>(p, t, low, end, end >= filled);
    // Before results are overwritten, and before a block leaves while others read them.
    sync();
    if (end >= filled) return;
    load_keys<T, D>(p, t, mine + classes);
    load_values<T, D>(p, t, mine + classes);
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kMostWarps * 32) softmax_decode_kernel(const Tiles<T> p) {
  let_next_start();
  const Tile t = tile_of(p);
  if (t.rows <= 0) return;
  uint64_t ancestors = 0;
  if (t.lane < t.own_rows)
    ancestors = static_cast<uint64_t>(p.step.ancestors[t.first + t.row + t.own_row + t.lane]);
  load_keys<T, D>(p, t, (t.warp << p.shift) + t.rank);
  load_values<T, D>(p, t, (t.warp << p.shift) + t.rank);
  load_stored_pool<T, D>(p, t);
  wait_for_previous();
  load_new<T, D>(p, t);
  if (t.warp == 0 && t.lane < t.own_rows) list_places(p.at)[t.lane] = t.length + __popcll(ancestors);
  take_rounds<T, D>(p, t, ancestors);
}

// Tiles of a step, `rows` rows being the most that one sequence can have among them.
struct Grid {
  int rows, parts, row_queries, warps, shift;
  int64_t tiles;
  Layout at;
};

int largest_memory() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "reading the current GPU");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "reading a GPU's properties");
  return bytes;
}

// As many blocks of a tile as have something to do, and are resident at once with those of all tiles.
int shift_of(const Grid& g, int chunks, int64_t all_tiles) {
  const int wanted = std::max((chunks + g.warps - 1) / g.warps, (g.rows + g.warps - 1) / g.warps);
  int shift = 0;
  while (has_clusters() && shift < kMostShift && 1 << shift < wanted &&
         all_tiles << (shift + 1) <= 2 * multiprocessors())
    ++shift;
  return shift;
}

Grid grid_of(int64_t group, int64_t rows, int64_t capacity, int64_t width, int64_t key_heads) {
  Grid g;
  g.row_queries = static_cast<int>(std::min<int64_t>(group, kQueries));
  g.parts = static_cast<int>((group + kQueries - 1) / kQueries);
  const int64_t most = std::min(rows, kMaxDecodeRows);
  g.rows = static_cast<int>(std::min<int64_t>(kQueries / g.row_queries, most));
  g.tiles = (most + g.rows - 1) / g.rows * g.parts;
  const int chunks = static_cast<int>(capacity / kChunk), memory = largest_memory();
  for (g.warps = kMostWarps;; g.warps /= 2) {
    g.shift = shift_of(g, chunks, g.tiles * key_heads);
    g.at = layout_of(static_cast<int>(width), g.warps, kQueries >> g.shift, static_cast<int>(most),
                     chunks > g.warps << g.shift);
    if (g.at.bytes <= memory || g.warps == 1) return g;
  }
}

template <typename T, int D>
void launch_tiles(const Context& ctx, const Tiles<T>& p, const Grid& g) {
  constexpr const char* kName = "softmax_attention_decode";
  const auto kernel = softmax_decode_kernel<T, D>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.at.bytes), kName);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        kName);
  const dim3 grid(static_cast<unsigned>(g.tiles << g.shift),
                  static_cast<unsigned>(p.step.sequences * p.step.key_heads));
  launch(ctx, kName,
         {.grid = grid,
          .block = dim3(static_cast<unsigned>(g.warps * 32)),
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
                   .at = g.at};
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
  return layout_of(static_cast<int>(width), 1, kQueries, kMaxDecodeRows, true).bytes <= largest_memory();
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

// Decoding with a cache on tensor cores: fp16 and bf16, head sizes 32, 64 and 128. A tile is up to 16 queries
// of one key head, whole rows where they fit, and belongs to a cluster of blocks. A warp takes the chunks of
// committed slots of one class for all of the tile's queries. Each block has a share of the queries: its
// warps take the last chunks of their rows, which hold the rows' own ancestors and are gathered in shared
// memory; and it puts their partial results together, read of the cluster's blocks. Where there are fewer
// warps than classes with chunks, this goes round by round. What the cache holds is fetched while the kernel
// ahead still runs.
#include <algorithm>

#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/decode_tiles.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/ops/linear.h"

namespace kernels::cuda {

namespace {

constexpr int kMostWarps = 4, kMostShift = 3;
constexpr int kAhead = 8;  // partial results that are fetched at once
// Blocks that the registers of a multiprocessor are to have room for: the kernel ahead has blocks there too.
template <int D>
constexpr int kResident = D == 128 ? 2 : 3;

// One of the two last chunks of one of the block's rows.
struct LastChunk {
  int item, row, which;
  int visible;                       // places of the chunk; 0: there is no such chunk
  int keys[kSteps], values[kSteps];  // this lane's rows of each step, in the pool
};

// Where the chunk's places lie in the pool.
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
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    chunk.keys[step] = rows[step * 16 + key_row()];
    chunk.values[step] = rows[step * 16 + value_row()];
  }
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
  const uint32_t queries = shared_address(block_memory) + value_row() * kRowBytes<D> + value_column();
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
      waiting = false;
    }
    if (!lasts && chunk >= t.full) break;
    const uint32_t from = shared_address(lasts ? block_memory + p.at.pool : stage),
                   apart = lasts ? p.at.apart : kChunk * kRowBytes<D>;
    uint32_t keys[kSteps], values[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int key = lasts ? last.keys[step] : step * 16 + key_row(),
                value = lasts ? last.values[step] : step * 16 + value_row();
      keys[step] = from + key * kRowBytes<D> + key_column();
      values[step] = from + apart + value * kRowBytes<D> + value_column();
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

// One thread's share of putting results together: two columns of the block's query i.
template <typename T, int D>
struct Finish {
  int i, column, row, head;
  bool inside;
  const float* from[kAhead];  // the query in the first stages of a round: of the blocks' first warps, then on

  __device__ Finish(const Tiles<T>& p, const Tile& t, int unit) { find(p, t, unit); }
  __device__ __forceinline__ void find(const Tiles<T>& p, const Tile& t, int unit) {
    i = unit / (D / 2), column = unit % (D / 2) * 2;
    inside = i < t.queries && find_query(p, t, t.mine + i, row, head);
    const auto* mine = reinterpret_cast<const float*>(block_memory + p.at.stages) + (t.mine + i) * kResult<D>;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int c = min(j, (t.warps << p.shift) - 1);
      from[j] = cluster_shared(mine, c & ((1 << p.shift) - 1)) + (c >> p.shift) * kStageFloats<D>;
    }
  }

  // Takes the classes [low, end), which have full chunks, out of this round's stages. Behind the loads there
  // are no branches, so that one weight need not wait for another.
  __device__ __forceinline__ void take_classes(const Tiles<T>& p, int low, int end, Columns& total) const {
#pragma unroll 1
    for (int first = low; first < end; first += kAhead) {
      const int warps = (first - low) >> p.shift;
      Columns x[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) x[j] = load_result<D>(from[j] + warps * kStageFloats<D>, column);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) x[j].keep();
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        Columns next = total;
        next.take(x[j]);
        if (first + j < end) total = next;
      }
    }
  }
  // The same for a row with more chunks than classes: last chunks may follow in a class.
  __device__ __forceinline__ void take_long_classes(const Tiles<T>& p, const Tile& t, int chunks, int low,
                                                    int end, Columns& total) const {
    const auto* mine = reinterpret_cast<const float*>(block_memory + p.at.stages) + (t.mine + i) * kResult<D>;
#pragma unroll 1
    for (int c = low; c < end; ++c) {
      const int rank = c & ((1 << p.shift) - 1), warp = (c - low) >> p.shift;
      Columns x = load_result<D>(cluster_shared(mine, rank) + warp * kStageFloats<D>, column);
      for (int chunk = t.full; chunk < chunks; ++chunk)
        if (chunk % kClasses == c) x.take(load_result<D>(last_result<D>(p.at, i, chunk - t.full), column));
      total.take(x);
    }
  }
  // What a round adds; behind the last round the result is complete.
  __device__ __forceinline__ void take_round(const Tiles<T>& p, const Tile& t, int unit, int low, int end,
                                             bool last) const {
    const int chunks = (list_places(p.at)[row - t.own_row] + kChunk - 1) / kChunk;
    auto* kept = reinterpret_cast<float4*>(block_memory + p.at.totals) + unit;
    Columns total;
    if (low > 0) total = {kept->x, kept->y, {kept->z, kept->w}};
    if (chunks <= kClasses)
      take_classes(p, low, min(end, t.full), total);
    else
      take_long_classes(p, t, chunks, low, min(end, min(t.full, kClasses)), total);
    if (!last) {
      *kept = {total.maximum, total.sum, total.out.x, total.out.y};
      return;
    }
#pragma unroll 1
    for (int chunk = t.full; chunk < min(chunks, kClasses); ++chunk)
      total.take(load_result<D>(last_result<D>(p.at, i, chunk - t.full), column));
    const float factor = __frcp_rn(total.sum);
    T* to = p.step.o + (t.first + t.row + row) * p.step.o_stride + head * D + column;
    *reinterpret_cast<uint32_t*>(to) =
        pack<T>(__fmul_rn(total.out.x, factor), __fmul_rn(total.out.y, factor));
  }
};

template <typename T, int D>
__device__ __forceinline__ void take_rounds(const Tiles<T>& p, const Tile& t, uint64_t ancestors,
                                            Finish<T, D>& finish) {
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
#pragma unroll 1
    for (int unit = threadIdx.x; unit < t.queries * D / 2; unit += blockDim.x) {
      if (t.queries * D / 2 > static_cast<int>(blockDim.x)) finish.find(p, t, unit);
      if (finish.inside) finish.take_round(p, t, unit, low, end, end >= filled);
    }
    // Before results are overwritten, and before a block leaves while others read them.
    sync();
    if (end >= filled) return;
    load_keys<T, D>(p, t, mine + classes);
    load_values<T, D>(p, t, mine + classes);
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kMostWarps * 32, kResident<D>) softmax_decode_kernel(const Tiles<T> p) {
  let_next_start();
  const Tile t = tile_of(p);
  if (t.rows <= 0) return;
  uint64_t ancestors = 0;
  if (t.lane < t.own_rows)
    ancestors = static_cast<uint64_t>(p.step.ancestors[t.first + t.row + t.own_row + t.lane]);
  load_keys<T, D>(p, t, (t.warp << p.shift) + t.rank);
  load_values<T, D>(p, t, (t.warp << p.shift) + t.rank);
  load_stored_pool<T, D>(p, t);
  NewRows<T, D> fresh(p, t);
  Finish<T, D> finish(p, t, threadIdx.x);
  wait_for_previous();
  fresh.load(p, t);
  append_rows<T, D>(p, t);
  if (t.warp == 0 && t.lane < t.own_rows) list_places(p.at)[t.lane] = t.length + __popcll(ancestors);
  take_rounds<T, D>(p, t, ancestors, finish);
}

// Tiles of a step, `rows` rows being the most that one sequence can have among them.
struct Grid {
  int rows, parts, row_queries, warps, shift;
  int64_t tiles;
  Layout at;
};

// Whether blocks can share a tile: code for older architectures, translated for this GPU, has no clusters.
bool shares_tiles() {
  static const bool compiled = [] {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, softmax_decode_kernel<__half, 64>),
          "reading a kernel's properties");
    return attributes.ptxVersion >= 90;
  }();
  return compiled && has_clusters();
}

// As many blocks of a tile as have something to do, and are resident at once with those of all tiles.
int shift_of(const Grid& g, int chunks, int64_t all_tiles) {
  const int wanted = std::max((chunks + g.warps - 1) / g.warps, (g.rows + g.warps - 1) / g.warps);
  int shift = 0;
  if (!shares_tiles()) return shift;
  while (shift < kMostShift && 1 << shift < wanted && all_tiles << (shift + 1) <= 2 * multiprocessors())
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
  const int chunks = static_cast<int>(capacity / kChunk), available = shared_memory_limit();
  for (g.warps = kMostWarps;; g.warps /= 2) {
    g.shift = shift_of(g, chunks, g.tiles * key_heads);
    g.at = layout_of(static_cast<int>(width), g.warps, kQueries >> g.shift, static_cast<int>(most),
                     chunks > g.warps << g.shift);
    if (g.at.bytes <= available || g.warps == 1) return g;
  }
}

template <typename T, int D>
void launch_tiles(const Context& ctx, const Tiles<T>& p, const Grid& g) {
  constexpr const char* kName = "softmax_attention_decode";
  const auto kernel = softmax_decode_kernel<T, D>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.at.bytes), kName);
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

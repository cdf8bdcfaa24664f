#pragma once
// A tile of a decoding step (kernels/cuda/decode_softmax.cu): which queries and rows a block has, its shared
// memory, and what goes there.
#include <algorithm>

#include "kernels/cuda/device/decode_chunk.cuh"
#include "kernels/ops/linear.h"

namespace kernels::cuda {

// Byte offsets in a block's shared memory; queries come first. The pool has keys and values of the committed
// slots behind the last full chunk, a row of zeros at kZeros, the step's own rows from kChunk on.
inline constexpr int kZeros = kChunk - 1;
inline constexpr int kWarps = 8, kThreads = kWarps * 32;  // of a block; the first ones have a stage each
struct Layout {
  int results;      // (queries of the block, 2, kResult) floats: of the last chunks
  int rows;         // (kWarps, kChunk) bytes: rows of the pool
  int pool, apart;  // apart: of a row's key and its value
  int stages;       // (stages): keys, values of a chunk; then (16, kResult) floats: of a class
  int totals;       // (queries of the block, D / 2) float4, where there are several rounds
  int bytes;
};
inline Layout layout_of(int width, int stages, int queries, int rows, bool rounds) {
  const int row = (width + 8) * 2, result = (width + 8) * 4;
  Layout l{};
  l.results = kQueries * row;
  l.rows = l.results + queries * 2 * result;
  l.pool = l.rows + kWarps * kChunk;
  l.apart = (kChunk + rows) * row;
  l.stages = l.pool + 2 * l.apart;
  l.totals = l.stages + stages * 2 * kChunk * row;
  l.bytes = l.totals + (rounds ? queries * width * 8 : 0);
  return l;
}

inline constexpr int kAhead = 8;  // partial results that are fetched at once
template <typename T>
struct Tiles {
  SoftmaxDecode<T> step;
  int group;        // queries of a row: H / Hk
  int rows, parts;  // of a tile: rows; tiles that a row's queries take
  int row_queries;  // queries of one row in a tile
  int row_factor;   // 2^16 / row_queries, rounded up
  int shift;        // a cluster has 2^shift blocks
  int stages;       // of a block
  Layout at;
  int rank[kAhead], ahead[kAhead];  // of a round's first results: the block, and the bytes into its stages
};

// blockIdx.x is the tile of a sequence's key head and the block of its cluster, y the sequence and key head.
struct Tile {
  int sequence, key_head, first, length, full;  // full: chunks of committed slots only
  int row, rows, query;                         // first row, rows, first query of a row
  int rank, mine, queries, own_row, own_rows;   // this block's share: queries, rows that have some of them
  int warp, lane;
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
  t.warp = threadIdx.x / 32, t.lane = threadIdx.x % 32;
  return t;
}

// The class whose full chunks this warp takes in the first round.
template <typename T>
__device__ int class_of(const Tiles<T>& p, const Tile& t) {
  return t.warp < p.stages ? (t.warp << p.shift) + t.rank : 1 << 30;
}

// Query i of the tile: its row within the tile and its head; false where there is none.
template <typename T>
__device__ bool find_query(const Tiles<T>& p, const Tile& t, int i, int& row, int& head) {
  row = row_of(p, i);
  const int member = t.query + i - row * p.row_queries;
  head = t.key_head * p.group + member;
  return row < t.rows && member < p.group;
}

extern __shared__ __align__(16) char block_memory[];

template <int D>
inline constexpr int kStageBytes = 2 * kChunk* kRowBytes<D>;
template <int D>
__device__ __forceinline__ char* stage_of(const Layout& at, int warp) {
  return block_memory + at.stages + warp * kStageBytes<D>;
}
// The result of the block's query i for the first or second of the last chunks.
template <int D>
__device__ __forceinline__ float* last_result(const Layout& at, int i, int which) {
  return reinterpret_cast<float*>(block_memory + at.results) + (i * 2 + which) * kResult<D>;
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
  const uint32_t pool = shared_address(block_memory + p.at.pool);
  const int i = threadIdx.x, threads = blockDim.x, slot = t.full * kChunk;
  load_stored<T, D>(p, t, p.step.cache_k, p.step.cache_k_stride, slot, t.length - slot, pool, i, threads);
  load_stored<T, D>(p, t, p.step.cache_v, p.step.cache_v_stride, slot, t.length - slot, pool + p.at.apart, i,
                    threads);
  if (i < D / 4)
    copy_unit(pool + (i < D / 8 ? 0 : p.at.apart) + kZeros * kRowBytes<D> + i % (D / 8) * 16, p.step.cache_k,
              false);
}
template <typename T, int D>
struct NewRows {
  static constexpr int kUnits = D / 8, kAtOnce = kThreads / kUnits;
  const T *q, *k, *v;
  uint32_t q_to, to;
  bool inside;
  int row, rows;

  __device__ NewRows(const Tiles<T>& p, const Tile& t) {
    const int unit = threadIdx.x % kUnits, column = t.key_head * D + unit * 8;
    row = threadIdx.x / kUnits;
    k = p.step.k + (t.first + row) * p.step.k_stride + column;
    v = p.step.v + (t.first + row) * p.step.v_stride + column;
    to = shared_address(block_memory + p.at.pool) + (kChunk + row) * kRowBytes<D> + unit * 16;
    rows = t.own_rows > 0 ? t.row + t.own_row + t.own_rows : 0;
    int query_row, head;
    inside = find_query(p, t, row, query_row, head);
    q = p.step.q + (inside ? (t.first + t.row + query_row) * p.step.q_stride + head * D : 0) + unit * 8;
    q_to = shared_address(block_memory) + row * kRowBytes<D> + unit * 16;
    settle(q), settle(k), settle(v);
  }
  __device__ __forceinline__ void load(const Tiles<T>& p) {
    static_assert(kAtOnce >= kQueries);
    if (row < kQueries) copy_unit(q_to, q, inside);
#pragma unroll 1
    for (; row < rows; row += kAtOnce) {
      copy_unit(to, k, true);
      copy_unit(to + p.at.apart, v, true);
      k += kAtOnce * p.step.k_stride, v += kAtOnce * p.step.v_stride;
      to += kAtOnce * kRowBytes<D>;
    }
    end_copies();
  }
};

// The new rows of which this block has the first query go from the pool into their slots, which nobody reads
// in the same launch. The last warps, which have least to do otherwise, begin.
template <typename T, int D>
__device__ void append_rows(const Tiles<T>& p, const Tile& t) {
  constexpr int kUnits = D / 8;
  if (t.query != 0) return;
#pragma unroll 1
  for (int i = kThreads - 1 - threadIdx.x; i < 2 * t.own_rows * kUnits; i += kThreads) {
    const bool value = i >= t.own_rows * kUnits;
    const int own = i / kUnits - (value ? t.own_rows : 0), row = t.row + t.own_row + own, unit = i % kUnits;
    const int slot = t.length + row;
    if ((t.own_row + own) * p.row_queries < t.mine || slot >= p.step.capacity) continue;
    const char* from =
        block_memory + p.at.pool + (value ? p.at.apart : 0) + (kChunk + row) * kRowBytes<D> + unit * 16;
    T* cache = value ? p.step.cache_v + t.sequence * p.step.cache_v_stride
                     : p.step.cache_k + t.sequence * p.step.cache_k_stride;
    T* to = cache + (int64_t{slot} * p.step.key_heads + t.key_head) * D + unit * 8;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  }
}

}  // namespace kernels::cuda

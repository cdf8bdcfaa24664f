#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "kernels/cuda/device/map.cuh"
#include "kernels/ops/embedding.h"

namespace kernels::cuda {

namespace {

constexpr int kThreads = 256;

struct Lookup {
  const int32_t *tokens, *positions;  // positions null: none are added
  const void *table, *position_table;
  void* y;
  int64_t table_stride, position_stride, y_stride;
  int64_t rows, table_rows, position_rows;
  int columns;
  unsigned across;  // threads of a block along a row, a power of two
};

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) lookup_kernel(const Lookup l) {
  const int64_t row = int64_t{blockIdx.x} * (kThreads / l.across) + threadIdx.x / l.across;
  let_next_start();
  wait_for_previous();
  if (row >= l.rows) return;
  const int64_t token = l.tokens[row], position = l.positions ? l.positions[row] : -1;
  const bool known = token < l.table_rows && position < l.position_rows;
  const T* e = static_cast<const T*>(l.table) + token * l.table_stride;
  const T* p = static_cast<const T*>(l.position_table) + position * l.position_stride;
  T* y = static_cast<T*>(l.y) + row * l.y_stride;
  for (int c = (threadIdx.x & (l.across - 1)) * N; c < l.columns; c += l.across * N) {
    Vector<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.at[j] = from_float<T>(known ? 0.0f : __int_as_float(0x7fffffff));
    if (known && token >= 0) {
      out = load_vector<T, N>(e + c);
      if (position >= 0) {
        const auto add = load_vector<T, N>(p + c);
#pragma unroll
        for (int j = 0; j < N; ++j) out.at[j] = from_float<T>(to_float(out.at[j]) + to_float(add.at[j]));
      }
    }
    store_global(y + c, out);
  }
}

template <typename T, int N>
void look_up(const Context& ctx, Lookup l) {
  const auto vectors = static_cast<unsigned>((l.columns + N - 1) / N);
  l.across = std::min<unsigned>(kThreads, std::bit_ceil(vectors));
  const int64_t rows = kThreads / l.across;
  const auto blocks = static_cast<unsigned>((l.rows + rows - 1) / rows);
  launch(ctx, "embedding", {.grid = blocks, .block = kThreads, .dependent = starts_early(blocks)},
         lookup_kernel<T, N>, l);
}

// The backward sorts the rows by table row, keeping their order, and cuts the sorted list into pieces. A
// block adds up the runs of one piece. A run that lies in one piece goes to the table at once; the parts of a
// longer one wait, and the piece it begins in adds them up in order.
constexpr int kPiece = 32, kAhead = 8;

struct Runs {
  const uint32_t* keys;  // ascending; `none` marks rows without a gradient
  const int32_t* rows;
  int64_t count;
  uint32_t none;
  const void* dy;
  int64_t dy_stride;
  float* table;
  int64_t table_stride;
  float* open;  // (pieces, 2, columns): sums of the runs that enter a piece and that leave it
  int columns;
};

// p = sum, or p += sum; in vectors where N allows.
template <bool kAdd, int N>
__device__ __forceinline__ void put(float* p, const float (&sum)[N]) {
  constexpr int kWide = N % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int j = 0; j < N; j += kWide) {
    Vector<float, kWide> v{};
    if constexpr (kAdd) v = load_vector<float, kWide>(p + j);
#pragma unroll
    for (int k = 0; k < kWide; ++k) v.at[k] += sum[j + k];
    store_global(p + j, v);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) pieces_kernel(const Runs r) {
  const int c = (blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (c >= r.columns) return;
  const int64_t piece = blockIdx.x, begin = piece * kPiece, end = min(r.count, begin + kPiece);
  bool entered = begin > 0 && r.keys[begin - 1] == r.keys[begin];
  float sum[N] = {};
  for (int64_t first = begin; first < end; first += kAhead) {
    uint32_t keys[kAhead + 1];
    Vector<T, N> dy[kAhead];
#pragma unroll
    for (int i = 0; i <= kAhead; ++i) keys[i] = first + i < r.count ? r.keys[first + i] : r.none;
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (first + i < end && keys[i] != r.none)
        dy[i] = load_vector<T, N>(static_cast<const T*>(r.dy) + r.rows[first + i] * r.dy_stride + c);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= end || keys[i] == r.none) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += to_float(dy[i].at[j]);
      const bool ends = keys[i + 1] != keys[i];
      if (!ends && first + i + 1 < end) continue;
      if (entered || !ends)
        put<false>(r.open + (2 * piece + (entered ? 0 : 1)) * r.columns + c, sum);
      else
        put<true>(r.table + keys[i] * r.table_stride + c, sum);
      entered = false;
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] = 0;
    }
  }
}

// Adds up the run that begins in a piece and leaves it.
template <int N>
__global__ void __launch_bounds__(kThreads) long_runs_kernel(const Runs r) {
  const int64_t piece = blockIdx.x, begin = piece * kPiece, end = begin + kPiece;
  if (end >= r.count) return;
  const uint32_t key = r.keys[end - 1];
  if (key == r.none || r.keys[end] != key || (begin > 0 && r.keys[begin - 1] == key)) return;
  const int c = (blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (c >= r.columns) return;
  float sum[N];
#pragma unroll
  for (int j = 0; j < N; ++j) sum[j] = r.open[(2 * piece + 1) * r.columns + c + j];
  bool inside = true;
  for (int64_t next = piece + 1; inside; next += kAhead) {
    Vector<float, N> part[kAhead];
    bool part_of_run[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t at = (next + i) * kPiece;
      part_of_run[i] = at < r.count && r.keys[at] == key;
      if (!part_of_run[i]) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) part[i].at[j] = r.open[2 * (next + i) * r.columns + c + j];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      inside = part_of_run[i];
      if (!inside) break;
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += part[i].at[j];
    }
  }
  put<true>(r.table + key * r.table_stride + c, sum);
}

__global__ void __launch_bounds__(kThreads)
    keys_kernel(const int32_t* index, const int32_t* keep, int64_t count, uint32_t none, uint32_t* keys,
                int32_t* rows) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  // As unsigned numbers negative indices are beyond every table.
  const auto key = static_cast<uint32_t>(index[i]);
  keys[i] = keep[i] < 0 || key > none ? none : key;
  rows[i] = static_cast<int32_t>(i);
}

// Working memory of the sort and of long runs. The sorter's own need is a few words for every thousand rows;
// it is compared with what was set aside before it runs.
struct Sorting {
  Tensor keys[2], rows[2], temporary, open;

  Sorting(Arena& scratch, int64_t count, int64_t columns) {
    for (auto& t : keys) t = scratch.allocate("sorted indices", DType::i32, {count});
    for (auto& t : rows) t = scratch.allocate("sorted rows", DType::i32, {count});
    temporary = scratch.allocate("sorting", DType::u8, {8 * count + (int64_t{1} << 18)});
    open = scratch.allocate("long runs", DType::f32, {(count + kPiece - 1) / kPiece, 2, columns});
  }
};

Runs sort(const Context& ctx, const Sorting& s, const Tensor& index, const Tensor& keep, int64_t table_rows) {
  Runs runs{};
  runs.count = index.numel();
  runs.none = static_cast<uint32_t>(table_rows);
  cub::DoubleBuffer<uint32_t> keys(static_cast<uint32_t*>(s.keys[0].data),
                                   static_cast<uint32_t*>(s.keys[1].data));
  cub::DoubleBuffer<int32_t> rows(s.rows[0].as<int32_t>(), s.rows[1].as<int32_t>());
  const auto blocks = static_cast<unsigned>((runs.count + kThreads - 1) / kThreads);
  keys_kernel<<<blocks, kThreads, 0, stream_of(ctx)>>>(index.as<int32_t>(), keep.as<int32_t>(), runs.count,
                                                       runs.none, keys.Current(), rows.Current());
  check_launch("embedding_backward");
  const int bits = std::bit_width(runs.none), count = static_cast<int>(runs.count);
  size_t needed = 0;
  const auto pass = [&](void* temporary) {
    check(cub::DeviceRadixSort::SortPairs(temporary, needed, keys, rows, count, 0, bits, stream_of(ctx)),
          "embedding_backward: sorting the tokens");
  };
  pass(nullptr);
  if (needed > s.temporary.bytes())
    throw DeviceError("embedding_backward: sorting " + std::to_string(count) + " rows needs " +
                      std::to_string(needed) + " bytes, " + std::to_string(s.temporary.bytes()) +
                      " are set aside");
  pass(s.temporary.data);
  runs.keys = keys.Current();
  runs.rows = rows.Current();
  return runs;
}

template <typename T, int N>
void add_runs(const Context& ctx, const Runs& runs) {
  const auto vectors = static_cast<unsigned>((runs.columns + N - 1) / N);
  const unsigned threads = std::min<unsigned>(kThreads, (vectors + 31) / 32 * 32);
  const dim3 grid(static_cast<unsigned>((runs.count + kPiece - 1) / kPiece),
                  (vectors + threads - 1) / threads);
  pieces_kernel<T, N><<<grid, threads, 0, stream_of(ctx)>>>(runs);
  long_runs_kernel<N><<<grid, threads, 0, stream_of(ctx)>>>(runs);
  check_launch("embedding_backward");
}

// table[index[i]] += dy[i] where index[i] and keep[i] are not negative.
void scatter_add(const Context& ctx, const Sorting& sorting, const Tensor& dy, const Tensor& index,
                 const Tensor& keep, const Tensor& table) {
  Runs runs = sort(ctx, sorting, index, keep, table.rows());
  runs.dy = dy.data;
  runs.dy_stride = dy.row_stride;
  runs.table = table.as<float>();
  runs.table_stride = table.row_stride;
  runs.open = sorting.open.as<float>();
  runs.columns = static_cast<int>(dy.cols());
  visit_device_dtype(dy.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int kWide = kVectorElements<T>;
    if (rows_aligned(dy, 16) && rows_aligned(table, 16) && runs.columns % kWide == 0)
      add_runs<T, kWide>(ctx, runs);
    else
      add_runs<T, 1>(ctx, runs);
  });
}

}  // namespace

void embedding(const Context& ctx, const Tensor& tokens, const Tensor& table, const Tensor& positions,
               const Tensor& position_table, Tensor y) {
  if (y.numel() == 0) return;
  Lookup l{};
  l.tokens = tokens.as<int32_t>();
  l.table = table.data, l.table_stride = table.row_stride, l.table_rows = table.rows();
  l.y = y.data, l.y_stride = y.row_stride;
  l.rows = y.rows();
  l.columns = static_cast<int>(y.cols());
  if (position_table) {
    l.positions = positions.as<int32_t>();
    l.position_table = position_table.data, l.position_stride = position_table.row_stride;
    l.position_rows = position_table.rows();
  }
  visit_device_dtype(y.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int kWide = kVectorElements<T>;
    const bool wide = rows_aligned(table, 16) && rows_aligned(y, 16) && l.columns % kWide == 0 &&
                      (!position_table || rows_aligned(position_table, 16));
    wide ? look_up<T, kWide>(ctx, l) : look_up<T, 1>(ctx, l);
  });
}

void embedding_backward(const Context& ctx, const Tensor& dy, const Tensor& tokens, Tensor dtable,
                        const Tensor& positions, Tensor dposition_table) {
  const ArenaScope scope(*ctx.scratch);
  const Sorting sorting(*ctx.scratch, dy.rows(), dy.cols());
  if (ctx.rehearsal || dy.numel() == 0) return;
  scatter_add(ctx, sorting, dy, tokens, tokens, dtable);
  if (dposition_table) scatter_add(ctx, sorting, dy, positions, tokens, dposition_table);
}

}  // namespace kernels::cuda

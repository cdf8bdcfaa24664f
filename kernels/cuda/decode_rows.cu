// Moving accepted rows to where plain decoding would have put them.
#include <numeric>

#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/ops/linear.h"
#include "kernels/ops/softmax_attention.h"

namespace kernels::cuda {

namespace {

constexpr int kThreads = 128;

struct Commit {
  char* cache;
  int64_t sequence_bytes, slot_bytes, path_stride;
  const int32_t *rows, *counts, *lengths;
  int capacity;
  bool since_fold;
};

// A thread moves one column of a sequence, row after row: what a row overwrites has been read by then.
template <typename Word>
__global__ void __launch_bounds__(kThreads) commit_rows_kernel(const Commit p) {
  let_next_start();
  wait_for_previous();
  const int64_t column = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * int64_t{sizeof(Word)};
  if (column >= p.slot_bytes) return;
  const int sequence = blockIdx.y, length = p.lengths[sequence];
  const int first = p.since_fold ? length % static_cast<int>(kFold) : length;
  const int count = min(p.counts[sequence], static_cast<int>(kMaxDecodeRows));
  const int32_t* rows = p.rows + sequence * p.path_stride;
  char* base = p.cache + sequence * p.sequence_bytes + column;
  const auto slot = [&](int i) { return reinterpret_cast<Word*>(base + (first + i) * p.slot_bytes); };
  for (int i = 0; i < count; ++i)
    if (rows[i] > i && first + rows[i] < p.capacity) *slot(i) = *slot(rows[i]);
}

}  // namespace

void commit_rows(const Context& ctx, const CommitPath& path, bool since_fold, Tensor cache) {
  const auto element = static_cast<int64_t>(size_of(cache.dtype));
  const Commit p{.cache = static_cast<char*>(cache.data),
                 .sequence_bytes = cache.row_stride * element,
                 .slot_bytes = cache.cols() / cache.dim(1) * element,
                 .path_stride = path.rows.row_stride,
                 .rows = path.rows.as<int32_t>(),
                 .counts = path.counts.as<int32_t>(),
                 .lengths = path.lengths.as<int32_t>(),
                 .capacity = static_cast<int>(cache.dim(1)),
                 .since_fold = since_fold};
  const auto launch = [&](auto word) {
    using Word = decltype(word);
    const int64_t words = p.slot_bytes / static_cast<int64_t>(sizeof(Word));
    const dim3 grid(static_cast<unsigned>((words + kThreads - 1) / kThreads),
                    static_cast<unsigned>(cache.rows()));
    kernels::cuda::launch(ctx, "commit_rows", {.grid = grid, .block = kThreads, .dependent = true},
                          commit_rows_kernel<Word>, p);
  };
  const int64_t alignment = std::gcd(std::gcd(p.slot_bytes, p.sequence_bytes),
                                     static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.cache)));
  if (alignment % 16 == 0) return launch(uint4{});
  if (alignment % 2 == 0) return launch(uint16_t{});
  launch(uint8_t{});
}

}  // namespace kernels::cuda

#pragma once
// What the attention kernels share: one head of a row, packed sequences, tasks spread over threads.
#include <fmt/format.h>

#include <array>
#include <atomic>
#include <cstring>

#include "kernels/core/parallel.h"
#include "kernels/core/tensor.h"
#include "kernels/cpu/staging.h"

namespace kernels::cpu {

// Working memory of this thread: at least `count` elements in the numbered buffer, valid until the same
// number is asked for again.
template <typename A>
A* staging(int slot, int64_t count) {
  thread_local std::array<Staging<A>, 16> buffers;
  return buffers[static_cast<size_t>(slot)].get(static_cast<size_t>(count));
}

// Rows from `row` on of one head of a tensor (N, H, D).
struct HeadView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t row_stride = 0;  // in elements
  int64_t width = 0;
};

inline HeadView head_view(const Tensor& x, int64_t row, int64_t head) {
  const int64_t width = x.dim(2);
  char* data = static_cast<char*>(x.data) + (row * x.row_stride + head * width) * size_of(x.dtype);
  return {data, x.dtype, x.row_stride, width};
}

// Training attention of one key head of one sequence. `saved` is what the forward keeps of each row: its
// log-sum-exp, or its denominator.
struct AttentionTask {
  const Tensor &q, &k, &v, &o, &saved;
  const Tensor &dout, &dq, &dk, &dv;  // backward only
  int64_t begin, rows, key_head;
  int64_t group() const { return q.dim(1) / k.dim(1); }
  int64_t width() const { return q.dim(2); }
  template <typename A>
  A& saved_at(int64_t row, int64_t head) const {
    return saved.as<A>()[row * saved.row_stride + head];
  }
};

// Throws ShapeError when the boundaries of the sequences do not ascend within the rows.
inline void check_sequences(const char* operation, const Tensor& cu_seqlens, int64_t rows) {
  const int32_t* cu = cu_seqlens.as<int32_t>();
  for (int64_t s = 0; s < cu_seqlens.rows(); ++s)
    if (cu[s] < (s == 0 ? 0 : cu[s - 1]) || cu[s] > rows)
      throw ShapeError(
          fmt::format("{}: cu_seqlens[{}] is {}; the boundaries must ascend from 0 to at most {}", operation,
                      s, cu[s], rows));
}

// Rows that belong to no sequence become zero, so that nothing stale flows on.
inline void clear_outside(const Tensor& cu_seqlens, const Tensor& x) {
  const int32_t* cu = cu_seqlens.as<int32_t>();
  const int64_t first = cu[0], last = cu[cu_seqlens.rows() - 1];
  const size_t element = size_of(x.dtype), row_bytes = static_cast<size_t>(x.cols()) * element;
  for (int64_t i = 0; i < x.rows(); ++i)
    if (i < first || i >= last) {
      char* row = static_cast<char*>(x.data) + static_cast<size_t>(i * x.row_stride) * element;
      std::memset(row, 0, row_bytes);
    }
}

// Calls fn(first row, rows, key head) for every head of every sequence; idle threads take the next one. What
// a call computes must depend on its arguments alone.
template <typename Fn>
void for_each_sequence_head(const Tensor& cu_seqlens, int64_t heads, Fn&& fn) {
  const int32_t* cu = cu_seqlens.as<int32_t>();
  const int64_t tasks = (cu_seqlens.rows() - 1) * heads;
  std::atomic<int64_t> next{0};
  parallel_region([&](int, int) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      const int64_t s = task / heads;
      if (cu[s + 1] > cu[s]) fn(int64_t{cu[s]}, int64_t{cu[s + 1] - cu[s]}, task % heads);
    }
  });
}

}  // namespace kernels::cpu

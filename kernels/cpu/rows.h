#pragma once
// How row-wise CPU code is split over threads.
#include <algorithm>
#include <cstdint>

#include "kernels/core/parallel.h"
#include "kernels/core/tensor.h"

namespace kernels::cpu {

// A pass over fewer elements than this takes a few microseconds: waking a team would cost as much.
inline constexpr int64_t kSerialElements = 16384;

// Calls fn(begin, end) over ranges of rows, each with work worth a thread of its own.
template <typename Fn>
void parallel_rows(int64_t rows, int64_t cols, Fn&& fn) {
  parallel_for(rows, std::max<int64_t>(1, kSerialElements / std::max<int64_t>(1, cols)), fn);
}

// Row i of t.
template <typename T>
T* row(const Tensor& t, int64_t i) {
  return static_cast<T*>(t.data) + i * t.row_stride;
}

}  // namespace kernels::cpu

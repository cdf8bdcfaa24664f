#pragma once
// One sequence's share of a decoding step, and how a step is spread over threads.
#include <cstring>

#include "kernels/core/parallel.h"
#include "kernels/cpu/attention.h"
#include "kernels/ops/decode_rows.h"
#include "kernels/ops/linear.h"

namespace kernels::cpu {

struct DecodeSequence {
  int64_t index;       // of the sequence
  int64_t first_row;   // of the step's rows
  int64_t rows;        // new ones
  int64_t length;      // committed tokens
  int64_t first_slot;  // where the new rows go: length, or length since the fold
  const int64_t* ancestors;
};

// Decoding of one key head of one sequence. Its queries are counted row by row and within a row by head.
struct DecodeTask {
  const Tensor &q, &k, &v, &o;
  DecodeSequence sequence;
  int64_t key_head;
  int64_t group = q.dim(1) / k.dim(1);
  int64_t queries() const { return sequence.rows * group; }
  // x is q or o.
  HeadView of_query(const Tensor& x, int64_t query) const {
    return head_view(x, sequence.first_row + query / group, key_head * group + query % group);
  }
  uint64_t ancestors(int64_t query) const { return static_cast<uint64_t>(sequence.ancestors[query / group]); }
};

inline DecodeSequence decode_sequence(const DecodeRows& rows, int64_t index, bool since_fold) {
  const int32_t* first = rows.first_row.as<int32_t>();
  const int64_t length = rows.lengths.as<int32_t>()[index];
  return {index,
          first[index],
          first[index + 1] - first[index],
          length,
          since_fold ? length % kFold : length,
          rows.ancestors.as<int64_t>() + first[index]};
}

// Throws ShapeError when the rows do not lie within the step or their slots beyond the capacity.
void check_decode_sequence(const char* operation, const DecodeSequence& s, int64_t capacity, int64_t rows);

// The sequence's slots of one head are base + slot * stride.
template <class T>
T* cache_head(const Tensor& cache, int64_t sequence, int64_t head) {
  return cache.as<T>() + sequence * cache.row_stride + head * cache.dim(3);
}

// Copies the step's rows of one head into their slots.
template <class T>
void append_rows(const Tensor& x, const DecodeSequence& s, int64_t head, const Tensor& cache) {
  const int64_t width = x.dim(2), stride = cache.dim(2) * width;
  T* to = cache_head<T>(cache, s.index, head) + s.first_slot * stride;
  const T* from = x.as<T>() + s.first_row * x.row_stride + head * width;
  for (int64_t j = 0; j < s.rows; ++j)
    std::memcpy(to + j * stride, from + j * x.row_stride, static_cast<size_t>(width) * sizeof(T));
}

// Calls fn(sequence, key head) for all; on several threads where `work` (multiply-adds) is worth waking them.
template <typename Fn>
void for_each_decode_head(int64_t sequences, int64_t heads, int64_t work, Fn&& fn) {
  constexpr int64_t kWorthwhile = 1 << 16;
  const int64_t tasks = sequences * heads;
  parallel_for(tasks, work < kWorthwhile ? tasks : 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) fn(task / heads, task % heads);
  });
}

}  // namespace kernels::cpu

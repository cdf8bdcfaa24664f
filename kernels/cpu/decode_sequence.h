#pragma once
// One sequence's share of a decoding step, and how a step is spread over threads.
#include <algorithm>
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

// Some queries of one key head of one sequence: counted row by row and within a row by head.
struct DecodeTask {
  const Tensor &q, &k, &o;
  DecodeSequence sequence;
  int64_t key_head, first_query, queries;
  int64_t group = q.dim(1) / k.dim(1);
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

// One head of the stored rows from `slot` on.
inline HeadView slot_view(const Tensor& cache, int64_t sequence, int64_t head, int64_t slot) {
  const int64_t width = cache.dim(3), stride = cache.dim(2) * width;
  const int64_t offset = sequence * cache.row_stride + slot * stride + head * width;
  return {static_cast<char*>(cache.data) + offset * size_of(cache.dtype), cache.dtype, stride, width};
}

// Copies the step's rows of one head into their slots.
inline void append_rows(const Tensor& x, const DecodeSequence& s, int64_t head, const Tensor& cache) {
  const size_t bytes = static_cast<size_t>(x.dim(2)) * size_of(x.dtype);
  const HeadView from = head_view(x, s.first_row, head);
  for (int64_t j = 0; j < s.rows; ++j) {
    const HeadView to = slot_view(cache, s.index, head, s.first_slot + j);
    std::memcpy(to.data, static_cast<char*>(from.data) + j * from.row_stride * size_of(x.dtype), bytes);
  }
}

// How many of `tasks` a thread takes at least: all where `work` (multiply-adds) is not worth waking others.
inline int64_t decode_grain(int64_t tasks, int64_t work) {
  constexpr int64_t kWorthwhile = 1 << 16;
  return work < kWorthwhile ? std::max<int64_t>(1, tasks) : 1;
}

// Calls fn(sequence, key head) for all.
template <typename Fn>
void for_each_decode_head(int64_t sequences, int64_t heads, int64_t work, Fn&& fn) {
  const int64_t tasks = sequences * heads;
  parallel_for(tasks, decode_grain(tasks, work), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) fn(task / heads, task % heads);
  });
}

// Calls fn(sequence, key head, first query, queries) until all queries of the step have had their turn: as
// many on each thread, since key heads are often fewer than threads.
template <typename Fn>
void for_each_decode_query(const DecodeRows& rows, int64_t heads, int64_t key_heads, int64_t work, Fn&& fn) {
  const int32_t* first_row = rows.first_row.as<int32_t>();
  const int64_t sequences = rows.lengths.rows(), total = (first_row[sequences] - first_row[0]) * heads;
  parallel_for(total, decode_grain(total, work), [&](int64_t begin, int64_t end) {
    int64_t at = 0;
    for (int64_t b = 0; b < sequences; ++b) {
      const int64_t count = (first_row[b + 1] - first_row[b]) * heads / key_heads;
      for (int64_t head = 0; head < key_heads; ++head, at += count) {
        const int64_t first = std::max(begin, at), last = std::min(end, at + count);
        if (first < last) fn(b, head, first - at, last - first);
      }
    }
  });
}

}  // namespace kernels::cpu

// Moving accepted rows to where plain decoding would have put them.
#include <fmt/format.h>

#include "kernels/cpu/decode_sequence.h"
#include "kernels/ops/softmax_attention.h"

namespace kernels::cpu {

void check_decode_sequence(const char* operation, const DecodeSequence& s, int64_t capacity, int64_t rows) {
  if (s.rows < 0 || s.rows > kMaxDecodeRows || s.first_row < 0 || s.first_row + s.rows > rows)
    throw ShapeError(
        fmt::format("{}: sequence {} has {} new rows from row {} on; at most {} of {} are possible",
                    operation, s.index, s.rows, s.first_row, kMaxDecodeRows, rows));
  if (s.length < 0 || s.first_slot + s.rows > capacity)
    throw ShapeError(fmt::format("{}: sequence {} would need {} slots, the state has {}", operation, s.index,
                                 s.first_slot + s.rows, capacity));
}

void commit_rows(const Context&, const CommitPath& path, bool since_fold, Tensor cache) {
  const int64_t slot = cache.cols() / cache.dim(1);
  const size_t slot_bytes = static_cast<size_t>(slot) * size_of(cache.dtype);
  for (int64_t b = 0; b < path.counts.rows(); ++b) {
    const int64_t length = path.lengths.as<int32_t>()[b], first = since_fold ? length % kFold : length;
    const int64_t count = path.counts.as<int32_t>()[b];
    const int32_t* rows = path.rows.as<int32_t>() + b * path.rows.row_stride;
    char* base =
        static_cast<char*>(cache.data) + static_cast<size_t>(b * cache.row_stride) * size_of(cache.dtype);
    if (since_fold && first + count > kFold)
      throw ShapeError(
          fmt::format("commit_rows: sequence {} accepts {} rows after {}; at most {} lie before the fold", b,
                      count, length, kFold - first));
    for (int64_t i = 0; i < count; ++i) {
      if (rows[i] < i || rows[i] >= kMaxDecodeRows || first + rows[i] >= cache.dim(1))
        throw ShapeError(fmt::format("commit_rows: sequence {} accepts row {} as its {}th", b, rows[i], i));
      if (rows[i] != i)
        std::memcpy(base + static_cast<size_t>(first + i) * slot_bytes,
                    base + static_cast<size_t>(first + rows[i]) * slot_bytes, slot_bytes);
    }
  }
}

}  // namespace kernels::cpu

#pragma once
// The inputs of the attention kinds' benchmarks.
#include "kernels/ops/decode_rows.h"
#include "tests/bench/gpu_bench.h"

namespace gpu_bench {

// Sequences of `length` rows each.
inline std::vector<int32_t> even_boundaries(int64_t sequences, int64_t length) {
  std::vector<int32_t> boundaries;
  for (int64_t s = 0; s <= sequences; ++s) boundaries.push_back(static_cast<int32_t>(s * length));
  return boundaries;
}

// q (0), k (1) or v (2) of rows (N, 3 H D), as a trainer holds them.
inline Tensor part(const Buffer& qkv, int64_t which, int64_t heads, int64_t width) {
  return qkv.tensor.columns(which * heads * width, heads * width).view({qkv.tensor.rows(), heads, width});
}

// A decoding step of GPT-2 124M's heads: a chain of `rows` new rows in each sequence after `length` committed
// ones.
struct DecodeStep {
  static constexpr int64_t kHeads = 12, kWidth = 64, kLayers = 12;
  Buffer qkv, o, first, lengths, positions, ancestors;

  DecodeStep(int64_t sequences, int64_t rows, int64_t length)
      : qkv(DType::f16, {sequences * rows, 3 * kHeads * kWidth}),
        o(DType::f16, {sequences * rows, kHeads, kWidth}),
        first(DType::i32, {sequences + 1}),
        lengths(DType::i32, {sequences}),
        positions(DType::i32, {sequences * rows}),
        ancestors(DType::i64, {sequences * rows}) {
    first.set(even_boundaries(sequences, rows));
    lengths.set(std::vector<int32_t>(static_cast<size_t>(sequences), static_cast<int32_t>(length)));
    std::vector<int64_t> masks;
    for (int64_t i = 0; i < sequences * rows; ++i)
      masks.push_back(static_cast<int64_t>((uint64_t{2} << (i % rows)) - 1));
    ancestors.set(masks);
  }
  Tensor q() const { return part(qkv, 0, kHeads, kWidth); }
  Tensor k() const { return part(qkv, 1, kHeads, kWidth); }
  Tensor v() const { return part(qkv, 2, kHeads, kWidth); }
  kernels::DecodeRows rows() const { return {first, lengths, positions, ancestors}; }
};

}  // namespace gpu_bench

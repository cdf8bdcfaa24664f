#pragma once
// The rows of one decoding step: n_b new tokens for each of B sequences, as a chain or as a tree. The same
// description serves prefill (a chain of prompt tokens), plain decoding (one row) and verification (root and
// drafts). On a GPU attention reads it, and what a state holds of committed tokens, before the kernels ahead
// in the stream have ended: between their writing and a step stands a copy, or the host's waiting.
#include "kernels/core/tensor.h"

namespace kernels {

// Linear states are folded when a sequence's length reaches a multiple of this; a step's rows must all lie
// before the next multiple, so that every row is summed in the order plain decoding sums it.
inline constexpr int64_t kFold = 64;

struct DecodeRows {
  Tensor first_row;  // (B + 1) int32: sequence b owns rows [first_row[b], first_row[b + 1]), at most
                     // kMaxDecodeRows
  Tensor lengths;    // (B) int32: tokens already committed
  Tensor positions;  // (N) int32: lengths[b] + depth of the row
  Tensor ancestors;  // (N) int64 bit set: bit j = row first_row[b] + j is an ancestor or the row itself.
                     // Parents come first
};

// The accepted path of each sequence, for commit: rows are counted from first_row[b].
struct CommitPath {
  Tensor rows;     // (B, kMaxDecodeRows) int32: ascending
  Tensor counts;   // (B) int32: how many are accepted; 0 rolls everything back
  Tensor lengths;  // (B) int32: tokens committed before this step
};

// Shapes and types of a step of `count` rows, of a path, and of q (N, H, D) with k, v (N, Hk, D); a
// ShapeError names the operation.
void check_decode_rows(const char* operation, const DecodeRows& rows, int64_t count, int64_t sequences);
void check_commit_path(const char* operation, const CommitPath& path, int64_t sequences);
void check_attention(const char* operation, const Tensor& q, const Tensor& k, const Tensor& v);

}  // namespace kernels

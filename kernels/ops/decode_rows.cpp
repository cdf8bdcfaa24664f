#include "kernels/ops/decode_rows.h"

#include "kernels/ops/linear.h"

namespace kernels {

void check_decode_rows(const char* operation, const DecodeRows& rows, int64_t count, int64_t sequences) {
  check_shape(operation, "first_row", rows.first_row, {sequences + 1});
  check_shape(operation, "lengths", rows.lengths, {sequences});
  check_shape(operation, "ancestors", rows.ancestors, {count});
  check_dtype(operation, "first_row", rows.first_row, DType::i32);
  check_dtype(operation, "lengths", rows.lengths, DType::i32);
  check_dtype(operation, "ancestors", rows.ancestors, DType::i64);
}

void check_commit_path(const char* operation, const CommitPath& path, int64_t sequences) {
  check_shape(operation, "rows", path.rows, {sequences, kMaxDecodeRows});
  check_shape(operation, "counts", path.counts, {sequences});
  check_shape(operation, "lengths", path.lengths, {sequences});
  for (const Tensor* x : {&path.rows, &path.counts, &path.lengths})
    check_dtype(operation, "path", *x, DType::i32);
}

void check_attention(const char* operation, const Tensor& q, const Tensor& k, const Tensor& v) {
  if (q.shape.rank() != 3 || k.shape.rank() != 3 || k.dim(1) == 0 || q.dim(1) % k.dim(1) != 0)
    throw ShapeError(std::string(operation) + ": q is " + to_string(q) + " and k is " + to_string(k) +
                     "; (N, H, D) and (N, Hk, D) are expected, H a multiple of Hk");
  check_shape(operation, "k", k, {q.dim(0), k.dim(1), q.dim(2)});
  check_shape(operation, "v", v, k.shape);
  check_dtype(operation, "k", k, q.dtype);
  check_dtype(operation, "v", v, q.dtype);
}

}  // namespace kernels

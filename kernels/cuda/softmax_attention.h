#pragma once
// The parts of training attention on a GPU: cuDNN's fused attention, own kernels for what it does not take,
// and what both need to know about packed sequences.
#include <array>

#include "kernels/ops/softmax_attention.h"

namespace kernels::cuda {

// One call; dout, dq, dk and dv are empty in the forward.
struct AttentionCall {
  Tensor q, k, v, o, log_sum, cu_seqlens;
  Tensor dout = {}, dq = {}, dk = {}, dv = {};
  AttentionHints hints = {};

  bool backward() const { return dq.shape.rank() != 0; }
  int64_t rows() const { return q.dim(0); }
  int64_t heads() const { return q.dim(1); }
  int64_t key_heads() const { return k.dim(1); }
  int64_t width() const { return q.dim(2); }
  int64_t sequences() const { return cu_seqlens.rows() - 1; }
  int64_t longest() const { return hints.longest > 0 ? hints.longest : rows(); }
  // log_sum is ordered (sequence, head, row): cuDNN reads it in no other order unless the sequences are
  // ragged.
  bool by_sequence() const { return hints.uniform && hints.longest % 128 == 0 && log_sum.dense(); }
};

// Runs the call through cuDNN, or rehearses its working memory. False where cuDNN does not take it; which
// calls those are depends on types, shapes and strides alone.
bool cudnn_attention(const Context& ctx, const AttentionCall& call);

// The same in own kernels: fp16, bf16 and fp32, head sizes up to kLargestWidth.
inline constexpr int64_t kLargestWidth = 256;
void tiled_attention(const Context& ctx, const AttentionCall& call);

// For cuDNN's ragged tensors: lengths (S) int32 and, for each of `strides`, offsets (S + 1) int64 =
// cu_seqlens * stride, one table behind the other. Rows of `cleared` that belong to no sequence become 0.
struct RaggedTables {
  int32_t* lengths;
  int64_t* offsets;
  std::array<int64_t, 9> strides = {};
  int tables = 0;
  std::array<Tensor, 3> cleared = {};
};
void make_ragged_tables(const Context& ctx, const Tensor& cu_seqlens, int64_t rows, const RaggedTables& to);

}  // namespace kernels::cuda

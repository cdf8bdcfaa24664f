#pragma once
// An attention kind: what happens between q, k, v and o. The block projects, rotates and adds the residual;
// it never asks which kind it holds. A kind owns its decoding state, which truncates like a cache.
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "configs/config.h"
#include "kernels/ops/softmax_attention.h"
#include "trainer/model/parameters.h"

namespace trainer {

// q (N, H, D); k, v (N, Hk, D): column blocks of one matrix.
struct AttentionInput {
  Tensor q, k, v;
  Tensor cu_seqlens;  // (S + 1) int32; empty while decoding
  kernels::AttentionHints hints = {};
};

struct AttentionSaved {
  Tensor output;      // (N, H, D) of the operation; main type where it is not normalised yet
  Tensor statistics;  // per row and head: log-sum or denominator
  Tensor norm_statistics;
};

// Memory of one layer for a batch of sequences. Rolling a step back is not committing it.
class AttentionState {
 public:
  virtual ~AttentionState() = default;
  virtual void commit(const Context& ctx, const kernels::CommitPath& path) = 0;
  virtual void reset(const Context& ctx) = 0;  // as after construction: nothing remembered
};

class Attention {
 public:
  virtual ~Attention() = default;
  // Writes o (N, H * D) of the compute type. `saved` is allocated from `arena` by forward.
  virtual void forward(const Context& ctx, const AttentionInput& in, Tensor o, AttentionSaved& saved,
                       kernels::Arena& arena) const = 0;
  // Writes dq, dk, dv (shapes of in.q, in.k, in.v).
  virtual void backward(const Context& ctx, const AttentionInput& in, const Tensor& dout,
                        const AttentionSaved& saved, Tensor dq, Tensor dk, Tensor dv) const = 0;
  virtual std::unique_ptr<AttentionState> make_state(const Context& ctx, int64_t batch,
                                                     int64_t capacity) const = 0;
  virtual void decode(const Context& ctx, const AttentionInput& in, const kernels::DecodeRows& rows,
                      AttentionState& state, Tensor o) const = 0;
};

struct AttentionKind {
  const char* name;
  std::function<std::unique_ptr<Attention>(ParameterStore&, const configs::Config&,
                                           const std::string& prefix)>
      make;
};
// The table of kinds: add one here.
const std::vector<AttentionKind>& attention_kinds();

}  // namespace trainer

#pragma once
// A pre-norm transformer block.
//   a = x + W_o attention(rotary(W_qkv norm(x)));   y = a + mlp(norm(a))
#include <memory>
#include <string>

#include "configs/config.h"
#include "trainer/model/attention/attention.h"
#include "trainer/model/linear.h"
#include "trainer/model/mlp.h"
#include "trainer/model/norm.h"

namespace trainer {

// Where the rows of x stand: packed sequences of a batch, or the rows of a decoding step.
struct RowPlan {
  Tensor positions;                           // (N) int32
  Tensor cu_seqlens;                          // (S + 1) int32; training and evaluation
  const kernels::DecodeRows* rows = nullptr;  // decoding
  kernels::AttentionHints hints = {};         // of cu_seqlens
  bool decoding() const { return rows != nullptr; }
};

class Block {
 public:
  struct Saved {
    Tensor attention_statistics, mlp_statistics;  // (N, 1, 2)
    Tensor attention_in;                          // (N, C) norm(x)
    Tensor qkv;                                   // (N, (H + 2 Hk) D), q and k rotated
    AttentionSaved attention;
    Tensor attention_out;  // (N, H D)
    Tensor middle;         // (N, C) a
    Tensor mlp_in;         // (N, C) norm(a)
    Mlp::Saved mlp;
  };

  // Registers the parameters; `kind` is a name of attention_kinds().
  Block(ParameterStore& store, const configs::Config& config, const std::string& kind,
        const std::string& prefix);

  // x (N, C) -> y (N, C), which may be x. `saved` is allocated from `arena`, which may be ctx.scratch.
  // `state` only when decoding.
  void forward(const Context& ctx, const Tensor& x, const RowPlan& plan, AttentionState* state, Tensor y,
               Saved& saved, kernels::Arena& arena) const;
  // d holds dy and then dx. x is the forward's. Writes dexpanded (shape of saved.mlp.expanded), of which
  // backward_expansion makes the gradients that are left, those of the MLP's first matrix: nothing waits for
  // them, so that the caller may have something else first.
  void backward(const Context& ctx, const Tensor& x, const RowPlan& plan, const Saved& saved, Tensor d,
                Tensor dexpanded) const;
  void backward_expansion(const Context& ctx, const Saved& saved, const Tensor& dexpanded) const {
    mlp_.backward_weight(ctx, dexpanded, saved.mlp_in);
  }

  std::unique_ptr<AttentionState> make_state(const Context& ctx, int64_t batch, int64_t capacity) const;
  void pack(const Context& ctx, kernels::Arena& panels);
  int64_t first_parameter() const { return attention_norm_.first_parameter(); }
  // From this one on, gradients are final before backward_expansion.
  int last_matrix() const { return mlp_.last_matrix(); }
  int64_t weight_bytes() const { return qkv_.bytes() + output_.bytes() + mlp_.weight_bytes(); }

 private:
  Saved allocate(kernels::Arena& arena, int64_t rows, DType dtype) const;
  // q, k and v as views of (N, (H + 2 Hk) D).
  AttentionInput split(const Tensor& qkv, const RowPlan& plan) const;
  void rotate(const Context& ctx, const Tensor& qkv, const RowPlan& plan, int direction) const;
  // The attention's output projection and what follows up to the MLP, whose input it returns.
  LayerInput add_attention(const Context& ctx, const Tensor& x, const Saved& saved, bool alone) const;
  void backward_attention(const Context& ctx, const RowPlan& plan, const Saved& saved, const Tensor& d,
                          Tensor dattention_in) const;

  int64_t heads_, kv_heads_, head_size_;
  bool rotary_;
  float theta_;
  Norm attention_norm_;
  Linear qkv_;
  std::unique_ptr<Attention> attention_;
  Linear output_;
  Norm mlp_norm_;
  Mlp mlp_;
};

}  // namespace trainer

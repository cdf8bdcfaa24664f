#pragma once
// Multi-token prediction (DeepSeek-V3 technical report 2024). Depth k >= 1:
//   hidden^k_i = norm(block(W [norm(E[token i + k]); norm(hidden^{k-1}_i)]))     predicts token i + 1 + k
// The block is a causal softmax block of its own; embedding and unembedding are the trunk's.
#include "configs/config.h"
#include "trainer/model/heads/head.h"

namespace trainer {

class Mtp final : public Head {
 public:
  struct Saved final : HeadSaved {
    Tensor embedded;                                               // (N, C) E[token]
    Tensor joined;                                                 // (N, 2C) both norms
    Tensor token_statistics, hidden_statistics, final_statistics;  // (N, 1, 2)
    Tensor block_in, block_out;                                    // (N, C)
    Block::Saved block;
  };

  Mtp(ParameterStore& store, const configs::Config& config, int64_t depth, int embedding);
  std::unique_ptr<HeadSaved> forward(const Context& ctx, const HeadInput& in, Tensor out,
                                     kernels::Arena& arena) const override;
  void backward(const Context& ctx, const HeadInput& in, const HeadSaved& saved, Tensor d,
                Tensor dhidden) const override;
  int first_parameter() const override { return token_norm_.first_parameter(); }
  void pack(const Context& ctx, kernels::Arena& panels) override;

  void depth(const Context& ctx, const HeadInput& in, AttentionState* state, Tensor out, Saved& saved,
             kernels::Arena& arena) const;
  std::unique_ptr<AttentionState> make_state(const Context& ctx, int64_t batch, int64_t capacity) const;

 private:
  ParameterStore& store_;
  int embedding_;
  Norm token_norm_, hidden_norm_;
  Linear projection_;
  Block block_;
  Norm final_norm_;
};

}  // namespace trainer

#pragma once
// A Medusa head (Cai et al. 2024): residual layers x + SiLU(W x + b), W and b from 0, so that a new head
// equals the language model's; its own vocabulary layer, where the configuration asks for it, starts as a
// copy of the unembedding. Head k, counting from 0, predicts the token k + 2 ahead. A sequential head (Hydra,
// Ankner et al. 2024) also reads the k + 1 tokens between: its layers start from
//   z_i = hidden_i + V [norm(E[token i + 1]); ... ; norm(E[token i + 1 + k])]
// with V (C, (k + 1) C) from 0 and E the trunk's.
#include <array>
#include <vector>

#include "configs/config.h"
#include "trainer/model/heads/head.h"

namespace trainer {

class Medusa final : public Head {
 public:
  static constexpr int kMaxLayers = 8;
  struct Saved final : HeadSaved {
    // Sequential only: the embeddings of the tokens between, and their norms.
    Tensor embedded, between;          // (N, (k + 1) C)
    Tensor statistics;                 // (N (k + 1), 1, 2)
    std::array<Tensor, kMaxLayers> x;  // (N, C) the input of each layer
    std::array<Tensor, kMaxLayers> u;  // (N, C) W x + b
  };

  Medusa(ParameterStore& store, const configs::Config& config, int64_t index, int64_t vocabulary,
         int embedding, int unembedding);
  std::unique_ptr<HeadSaved> forward(const Context& ctx, const HeadInput& in, Tensor out,
                                     kernels::Arena& arena) const override;
  void backward(const Context& ctx, const HeadInput& in, const HeadSaved& saved, Tensor d,
                Tensor dhidden) const override;
  int first_parameter() const override { return first_; }
  const Linear* own_vocabulary() const override { return own_ ? &vocabulary_ : nullptr; }
  void pack(const Context& ctx, kernels::Arena& panels) override;

  // Rows alone, with working memory from ctx.scratch. tokens, of a sequential head: (N, k + 1) int32, row i
  // the tokens between, negative where none is known; out may be hidden.
  void decode(const Context& ctx, const Tensor& hidden, const Tensor& tokens, Tensor out) const;

 private:
  void layers(const Context& ctx, const Tensor& hidden, Tensor out, Saved& saved, kernels::Arena& arena,
              bool rows_alone) const;
  void backward_tokens(const Context& ctx, const Tensor& tokens, const Saved& saved, const Tensor& dz) const;
  Tensor each_token(const Tensor& t) const;  // (N, (k + 1) C) as (N (k + 1), C)
  void allocate_between(kernels::Arena& arena, const Tensor& hidden, Saved& saved) const;

  ParameterStore& store_;
  int embedding_;
  bool sequential_;
  int first_;
  Linear between_;  // V
  Norm token_norm_;
  std::vector<Linear> layers_;
  bool own_;
  Linear vocabulary_;
};

}  // namespace trainer

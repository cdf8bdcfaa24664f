#pragma once
// A Medusa head (Cai et al. 2024): residual layers x + SiLU(W x + b), W and b from 0, so that a new head
// equals the language model's; its own vocabulary layer, where the configuration asks for it, starts as a
// copy of the unembedding. Head i, counting from 0, predicts the token i + 2 ahead.
#include <array>
#include <vector>

#include "configs/config.h"
#include "trainer/model/heads/head.h"

namespace trainer {

class Medusa final : public Head {
 public:
  static constexpr int kMaxLayers = 8;
  struct Saved final : HeadSaved {
    std::array<Tensor, kMaxLayers> x;  // (N, C) the input of each layer
    std::array<Tensor, kMaxLayers> u;  // (N, C) W x + b
  };

  Medusa(ParameterStore& store, const configs::Config& config, int64_t index, int64_t vocabulary,
         int unembedding);
  std::unique_ptr<HeadSaved> forward(const Context& ctx, const HeadInput& in, Tensor out,
                                     kernels::Arena& arena) const override;
  void backward(const Context& ctx, const HeadInput& in, const HeadSaved& saved, Tensor d,
                Tensor dhidden) const override;
  int first_parameter() const override { return first_; }
  const Linear* own_vocabulary() const override { return own_ ? &vocabulary_ : nullptr; }
  void pack(const Context& ctx, kernels::Arena& panels) override;

  void layers(const Context& ctx, const Tensor& hidden, Tensor out, Saved& saved, kernels::Arena& arena,
              bool rows_alone) const;

 private:
  int first_;
  std::vector<Linear> layers_;
  bool own_;
  Linear vocabulary_;
};

}  // namespace trainer

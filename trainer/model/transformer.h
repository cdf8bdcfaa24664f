#pragma once
// The trunk: embedding, blocks, final norm. It knows no heads.
#include <optional>
#include <vector>

#include "configs/config.h"
#include "trainer/model/block.h"
#include "trainer/model/final_gradients.h"

namespace trainer {

class Transformer {
 public:
  struct Saved {
    std::vector<Tensor> x;  // (N, C) the input of each block, then of the final norm
    std::vector<Block::Saved> blocks;
    Tensor statistics;                     // (N, 1, 2) of the final norm
    Tensor embedded, embedded_statistics;  // (N, C), (N, 1, 2): what embedding_norm read
  };
  using States = std::vector<std::unique_ptr<AttentionState>>;

  // Registers the parameters in the order of the forward.
  Transformer(ParameterStore& store, const configs::Config& config, int64_t vocabulary);

  // hidden (N, C). With `saved`, what the backward needs is allocated from `arena`; without, `arena` (which
  // may be ctx.scratch) holds one block at a time and is left as it was. `states`, one per block, only when
  // decoding.
  void forward(const Context& ctx, const Tensor& tokens, const RowPlan& plan, States* states, Tensor hidden,
               Saved* saved, kernels::Arena& arena) const;
  // The embedding, which is exchanged for longest, is final ahead of a matrix of the first block.
  void backward(const Context& ctx, const Tensor& tokens, const RowPlan& plan, const Saved& saved,
                const Tensor& dhidden, FinalGradients& final) const;

  States make_states(const Context& ctx, int64_t batch, int64_t capacity) const;
  void pack(const Context& ctx, kernels::Arena& panels);
  int64_t weight_bytes() const;
  int embedding() const { return embedding_; }

 private:
  int64_t begin(int parameter) const;
  void embed(const Context& ctx, const Tensor& tokens, const RowPlan& plan, Tensor x, Saved& saved,
             kernels::Arena& arena) const;
  // d, or what embedding_norm makes of it: allocated from ctx.scratch.
  Tensor embedded_gradient(const Context& ctx, const Saved& saved, const Tensor& d) const;

  ParameterStore& store_;
  int embedding_ = -1, positions_ = -1;
  std::optional<Norm> embedding_norm_;
  std::vector<Block> blocks_;
  Norm final_norm_;
};

}  // namespace trainer

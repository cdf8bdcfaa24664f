#pragma once
// The model: a trunk of pre-norm blocks, and heads that look further ahead. The same forward serves training,
// evaluation, prefill, drafting and verification.
//
//   x_0 = E[tokens] (+ P[positions]), normalised where model.embedding_norm
//   x += attention(norm(x));  x += mlp(norm(x));  hidden = norm(x)
//   language model   logits(hidden_i)            predicts token i + 1    (offset 0)
//   Medusa k >= 0    logits(residual_k(hidden_i)) predicts token i + 2 + k (offset k + 1)
//                    sequential: residual_k(hidden_i + V_k [norm(E[token i + 1]); ...; norm(E[token i + 1
//                    + k])])
//   MTP depth k >= 1 hidden^k_i = norm(block(W [norm(E[token i + k]); norm(hidden^{k-1}_i)])), hidden^0 =
//   hidden;
//                    logits(hidden^k_i)          predicts token i + 1 + k (offset k)
// Sources: Cai et al. 2024 (Medusa), Ankner et al. 2024 (sequential heads: Hydra), DeepSeek-V3 technical
// report 2024 (MTP).
#include <memory>
#include <string>
#include <vector>

#include "configs/config.h"
#include "trainer/model/attention/attention.h"
#include "trainer/model/final_gradients.h"
#include "trainer/model/parameters.h"

namespace trainer {

// A micro-batch on the device; data::Batch says what the fields mean.
struct ModelBatch {
  Tensor tokens, positions, cu_seqlens;  // (N), (N), (S + 1) int32
  Tensor targets;                        // (K, N) int32
  Tensor weights;                        // (K, N) fp32
  kernels::AttentionHints hints = {};    // of cu_seqlens
};

struct HeadLoss {
  std::string name;  // "lm", "medusa.0", "mtp.1"
  int64_t offset;    // row of targets and weights: 0 is the next token
  double weight;     // in the total loss; 1 for the language model
};

// States of the trunk's layers, or of one MTP depth's block, for B sequences. A capacity counts the rows of
// the step under way too; with learned positions it cannot be more than model.context.
class DecodeState {
 public:
  DecodeState(int64_t batch, int64_t capacity) : batch_(batch), capacity_(capacity) {}
  int64_t batch() const { return batch_; }
  int64_t capacity() const { return capacity_; }
  std::vector<std::unique_ptr<AttentionState>>& layers() { return layers_; }
  void commit(const Context& ctx, const kernels::CommitPath& path);
  void reset(const Context& ctx);

 private:
  int64_t batch_, capacity_;
  std::vector<std::unique_ptr<AttentionState>> layers_;
};

class Model {
 public:
  // Registers the parameters. As made it can only be rehearsed; parameters().allocate() and then initialize()
  // or load_weights() make it usable. train.trainable = heads freezes everything but the heads: there is no
  // backward through the trunk then.
  Model(const configs::Config& config, int64_t vocabulary);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  ParameterStore& parameters();
  const ParameterStore& parameters() const;
  const configs::Config& config() const;
  int64_t vocabulary() const;
  int64_t width() const;
  // The losses in the order of forward_backward's loss_sums; K = 1 + the largest offset.
  const std::vector<HeadLoss>& losses() const;
  int64_t offsets() const;

  // One micro-batch: forward, every head's loss, backward; gradients are accumulated (+=).
  //   seeds        (losses) fp32: of loss i's gradient; loss scale, loss weight and normaliser multiplied
  //   loss_sums    (losses) fp64: += weighted sum of the token losses
  //   gradients_final(begin, end)  is called during the backward whenever gradients of more elements, [begin,
  //   end), are final: parts and order are the same each time, in a rehearsal too. May be empty.
  // `saved` is the arena of activations, ctx.scratch the working memory; both are left as they were. With
  // ctx.rehearsal and measuring arenas the same code runs and measures.
  void forward_backward(const Context& ctx, const ModelBatch& batch, const Tensor& seeds,
                        kernels::Arena& saved, Tensor loss_sums, const GradientsFinal& gradients_final) const;
  // Losses only.
  void evaluate(const Context& ctx, const ModelBatch& batch, kernels::Arena& saved, Tensor loss_sums) const;

  // Decoding. Call prepare_decoding after the weights are there and again when they have changed (packs them
  // for the row-invariant kernels). Working memory comes from ctx.scratch: rehearse a step of the most rows
  // to size it.
  void prepare_decoding(const Context& ctx);
  DecodeState make_trunk_state(const Context& ctx, int64_t batch, int64_t capacity) const;
  DecodeState make_mtp_state(const Context& ctx, int64_t batch, int64_t capacity) const;  // one depth
  // hidden (N, C) of the step's rows; state is appended to, not committed.
  void decode_trunk(const Context& ctx, const Tensor& tokens, const kernels::DecodeRows& rows,
                    DecodeState& state, Tensor hidden) const;
  // MTP depth `depth` (1-based; one beyond the last uses the last again): row i combines hidden_in row i with
  // tokens[i].
  void decode_mtp(const Context& ctx, int64_t depth, const Tensor& tokens, const Tensor& hidden_in,
                  const kernels::DecodeRows& rows, DecodeState& state, Tensor hidden_out) const;
  // Medusa head k's hidden rows from the trunk's; out may be hidden. tokens, with heads.medusa_sequential
  // only: (N, k + 1) int32, row i the k + 1 tokens after hidden row i's, negative where none is known.
  void medusa_hidden(const Context& ctx, int64_t head, const Tensor& hidden, const Tensor& tokens,
                     Tensor out) const;
  // logits (N, V) fp32 of hidden rows; medusa_head >= 0 uses that head's own vocabulary layer where it has
  // one.
  void logits(const Context& ctx, const Tensor& hidden, Tensor logits, int64_t medusa_head = -1) const;
  // Bytes of weights that one plain decoding step reads.
  int64_t decode_weight_bytes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace trainer

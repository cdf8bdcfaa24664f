#pragma once
// Medusa (Cai et al. 2024): head k, reading the trunk's hidden state at the last accepted token, proposes the
// tokens of level k + 1. A chain takes each head's best; a tree holds the combinations of ranks that a
// best-first search over measured acceptances chooses.
#include "trainer/decode/drafters/drafter.h"
#include "trainer/decode/replay.h"

namespace trainer {

class MedusaDrafter : public Drafter {
 public:
  enum class Kind { chain, tree };
  MedusaDrafter(const Context& ctx, const Model& model, const DrafterParams& params, Kind kind);
  void reset(const Context& ctx) override;
  void observe(const Context& ctx, int64_t sequence, const SequenceView& view, const Tensor& hidden,
               std::span<const int32_t> rows, int64_t first) override;
  void propose(const Context& ctx, std::span<const SequenceView> sequences, const DraftSettings& settings,
               std::span<DraftTree> trees) override;
  void set_drafts(int64_t count) override;
  int64_t max_drafts() const override { return max_drafts_; }
  void calibrate(const std::vector<std::vector<double>>& acceptance) override;
  std::vector<double> node_values() const override;

 private:
  void allocate(const Context& ctx);
  void head_logits(const Context& ctx, int64_t levels);
  void rank_candidates(const Context& ctx, int64_t levels);
  void draw_candidates(const Context& ctx, int64_t levels, std::span<const SequenceView> sequences,
                       double temperature);
  void grow(const SequenceView& view, int64_t sequence, int64_t levels, bool sampled, DraftTree& tree);
  int32_t& candidate(int64_t level, int64_t sequence, int64_t rank) {
    return candidates_[(level * batch_ + sequence) * width_ + rank];
  }

  const Model& model_;
  Kind kind_;
  int64_t batch_, heads_, max_drafts_, drafts_, width_ = 1;
  bool own_vocabulary_;
  TreeShape shape_;
  kernels::Arena memory_;
  Tensor last_hidden_;               // (B, C): the trunk's, at the last accepted token
  Tensor hidden_;                    // (heads * B, C), head by head
  Tensor logits_, q_;                // (heads * B, V)
  SharedResult top_;                 // (heads * B, width)
  std::vector<int32_t> candidates_;  // (heads, B, width); -1: no such candidate
  std::vector<float> left_;
  HostCopy q_host_;
  Replay replay_;
  std::vector<int> nodes_;  // tree node of each draft of the shape, -1 where it was left out
};

// Watches a text go by and counts how often each head's candidates of each rank are the token that follows.
class MedusaProbe : public Drafter {
 public:
  static constexpr int64_t kRanks = 10;
  MedusaProbe(const Context& ctx, const Model& model);
  void reset(const Context&) override {}
  void observe(const Context& ctx, int64_t sequence, const SequenceView& view, const Tensor& hidden,
               std::span<const int32_t> rows, int64_t first) override;
  void propose(const Context&, std::span<const SequenceView>, const DraftSettings&,
               std::span<DraftTree>) override {}
  void set_drafts(int64_t) override {}
  int64_t max_drafts() const override { return 0; }
  // [head][rank], over everything observed.
  std::vector<std::vector<double>> acceptance() const;

 private:
  const Model& model_;
  int64_t heads_, ranks_;
  kernels::Arena memory_;
  Tensor rows_, hidden_, logits_, top_;
  HostCopy top_host_;
  std::vector<std::vector<double>> hits_;
  std::vector<double> rows_seen_;
};

}  // namespace trainer

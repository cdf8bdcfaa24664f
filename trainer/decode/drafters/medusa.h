#pragma once
// Medusa (Cai et al. 2024): head k, reading the trunk's hidden state at the last accepted token, proposes the
// tokens of level k + 1. A chain takes each head's best; a tree holds the combinations of ranks that a
// best-first search over measured acceptances chooses. Sequential heads also read the tokens on the way to
// the place they propose for, so that each node of a tree has candidates of its own.
#include "kernels/ops/linear.h"
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
  // Candidates that are computed together: of one level with sequential heads, which read the drafts above,
  // of all levels otherwise, and for a chain of one sequence, whose candidates the device reads by itself.
  struct Pass {
    int64_t level, levels, first, rows;  // rows_[first, first + rows)
  };
  struct Row {
    int64_t sequence, level;
  };
  void allocate(const Context& ctx);
  int64_t plan(std::span<const SequenceView> sequences);
  Pass begin_pass(int64_t level, int64_t levels, int64_t first, std::span<const DraftTree> trees);
  bool ask(int64_t row, int64_t level, int64_t first, int64_t sequence, int node, const DraftTree& tree);
  void head_logits(const Context& ctx, const Pass& pass, int64_t begin, int64_t end);
  void choose(const Context& ctx, const Pass& pass, int64_t first, int64_t rows,
              const DraftSettings& settings);
  void find_candidates(const Context& ctx, const Pass& pass, std::span<const SequenceView> sequences,
                       const DraftSettings& settings);
  void take_chances(const Pass& pass, std::span<const SequenceView> sequences);
  void grow(const Pass& pass, int64_t sequence, bool sampled, DraftTree& tree);
  int& node(int64_t sequence, int draft) { return nodes_[sequence * kMaxDrafts + draft]; }
  int parent_node(int64_t sequence, int draft) {
    return shape_.parents[draft] < 0 ? 0 : node(sequence, shape_.parents[draft]);
  }
  // The row whose candidates a draft is one of.
  int64_t& row_below(int64_t sequence, int draft) {
    return below_[sequence * kMaxDrafts + shape_.parents[draft] + 1];
  }

  static constexpr int64_t kMaxDrafts = kernels::kMaxDecodeRows;  // and the root
  const Model& model_;
  Kind kind_;
  bool sequential_, leads_on_, own_vocabulary_;
  int64_t batch_, heads_, max_drafts_, drafts_, most_rows_, width_ = 1;
  TreeShape shape_;
  kernels::Arena memory_;
  Tensor last_hidden_;      // (B, C): the trunk's, at the last accepted token
  Tensor inputs_, hidden_;  // (rows, C) of a pass; inputs_ with sequential heads only
  Tensor logits_;           // (rows, V) of a pass
  Tensor q_;                // (rows, V) of all passes of a step
  // (rows) the sequence of each row of a pass, then (rows, level + 1) the tokens from the root to its node.
  SharedResult asked_;
  // (rows, width) of a pass: candidates, ahead of them the root where a chain leads on, and the random
  // numbers that draw them.
  SharedResult top_, chances_;
  std::vector<Row> rows_;
  std::vector<int32_t> candidates_;  // (rows, width); -1: no such candidate
  Replay replay_;
  std::vector<int> nodes_;      // (B, kMaxDrafts) tree node of each draft of the shape
  std::vector<int64_t> below_;  // (B, kMaxDrafts) row of the candidates below the root and each draft
};

// Watches a text go by and counts how often each head's candidates of each rank are the token that follows.
// What is counted are drafts below roots from a position on: those that decoding from there would have made.
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
  // For the texts that follow; 0 counts all of them.
  void count_from(int64_t position) { from_ = position; }
  // [head][rank], over everything counted.
  std::vector<std::vector<double>> acceptance() const;

 private:
  const Model& model_;
  int64_t heads_, ranks_, from_ = 0;
  kernels::Arena memory_;
  Tensor rows_, hidden_, logits_, top_;
  SharedResult tokens_;  // (rows, head + 1) the tokens after each row
  HostCopy top_host_;
  std::vector<std::vector<double>> hits_;
  std::vector<double> rows_seen_;
};

}  // namespace trainer

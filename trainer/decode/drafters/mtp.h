#pragma once
// Multi-token prediction modules (DeepSeek-V3) as a drafter. Depth k combines hidden^{k-1} of row i with
// token i + k and predicts token i + k + 1. Every depth has a cache of its own, committed with rows whose
// hidden states and tokens are the accepted ones; rows that rest on drafts are computed again once the tokens
// are known. Past the last depth the last module is applied to its own output, one row further on.
#include <utility>

#include "trainer/decode/drafters/drafter.h"
#include "trainer/decode/step_rows.h"

namespace trainer {

class MtpDrafter : public Drafter {
 public:
  MtpDrafter(const Context& ctx, const Model& model, const DrafterParams& params);
  void reset(const Context& ctx) override;
  void observe(const Context& ctx, int64_t sequence, const SequenceView& view, const Tensor& hidden,
               std::span<const int32_t> rows, int64_t first) override;
  void propose(const Context& ctx, std::span<const SequenceView> sequences, const DraftSettings& settings,
               std::span<DraftTree> trees) override;
  void set_drafts(int64_t count) override { drafts_ = std::clamp<int64_t>(count, 0, max_drafts_); }
  int64_t max_drafts() const override { return max_drafts_; }

 private:
  // One depth of one sequence.
  struct Depth {
    DecodeState state;
    Tensor inputs;  // (R, C): hidden^{k-1} of rows [committed, committed + count), then of drafted rows
    int64_t committed = 0;  // rows in the state
    int64_t count = 0;      // rows of accepted tokens that wait
  };
  struct Sequence {
    std::vector<Depth> depths;
    Tensor output;  // (1, C): hidden of the row that predicts the next draft
  };

  void append(const Context& ctx, Depth& depth, int64_t at, const Tensor& hidden);
  // Runs `count` rows of sequence b through depth k, at a state of `length` rows: those of the tokens of
  // text_ from `first` on. The hidden state of the last of them goes to `last` too, where that is a tensor.
  Tensor run(const Context& ctx, int64_t b, int64_t k, DecodeState& state, int64_t length, int64_t first,
             int64_t count, const Tensor& inputs, const Tensor& last);
  // The drafts that only the device knows yet, as tokens of the rows that are uploaded.
  void fill_in_drafts(const Context& ctx, int64_t b, int64_t first, int64_t count);
  // Commits all rows of the latest run.
  void commit(const Context& ctx, DecodeState& state);
  void catch_up(const Context& ctx, int64_t b, std::span<const int32_t> tokens);
  bool advance_drafted(const Context& ctx, int64_t b, int64_t k, int64_t root);
  bool advance_beyond(const Context& ctx, int64_t b, int64_t root, int64_t draft);
  // Where draft 1, 2, ... of a sequence stands among all, from 0.
  int64_t row_of(int64_t b, int64_t draft) const { return b * max_drafts_ + draft - 1; }
  // Draft number `draft` is the likeliest token or, where drafts are sampled, one that is drawn. It stays on
  // the device.
  void take_draft(const Context& ctx, int64_t b, int64_t draft, const DraftSettings& settings);
  // How many drafts there are for sequence b, on the device.
  int64_t propose_one(const Context& ctx, int64_t b, const SequenceView& view, const DraftSettings& settings);

  const Model& model_;
  int64_t modules_, max_drafts_, drafts_;
  kernels::Arena memory_;
  std::vector<Sequence> sequences_;
  StepRows rows_;
  Tensor hidden_;                 // (64, C): outputs of the latest run
  Tensor logits_;                 // (1, V)
  Tensor q_;                      // (B * max_drafts, V)
  SharedResult found_, chances_;  // (B, max_drafts): drafts, and the random numbers that draw them
  std::vector<int32_t> text_;     // accepted tokens and drafts, of which the device may know more
  int64_t accepted_ = 0;          // tokens of text_ that are no drafts
  bool on_device_ = false;        // drafts of text_ are placeholders for those in found_
  Replay replay_;
};

}  // namespace trainer

#pragma once
// Prompt lookup: what followed the longest earlier occurrence of the latest tokens is proposed again. An
// index of recent n-grams makes a look-up cost a few hash probes, whatever the length of the text.
#include "trainer/decode/drafters/drafter.h"

namespace trainer {

// Where each n-gram of one growing text was last seen, for n in [kShortest, kLongest].
class NgramIndex {
 public:
  static constexpr int kShortest = 2, kLongest = 4;
  explicit NgramIndex(int64_t capacity);
  void clear();
  // Takes in every n-gram that has a follower in `tokens`.
  void extend(std::span<const int32_t> tokens);
  // Position of the token that followed the longest suffix of `tokens` when it was last seen; -1 if never.
  int64_t find(std::span<const int32_t> tokens) const;

 private:
  size_t slot(const int32_t* last, int n) const;
  int64_t indexed_ = 0;  // n-grams that end before this position are in
  size_t mask_;
  std::vector<int32_t> followers_;  // (lengths, slots): the latest follower's position, 0 if none
};

class NgramDrafter : public Drafter {
 public:
  explicit NgramDrafter(const DrafterParams& params);
  void reset(const Context& ctx) override;
  void observe(const Context& ctx, int64_t sequence, const SequenceView& view, const Tensor& hidden,
               std::span<const int32_t> rows, int64_t first) override;
  void propose(const Context& ctx, std::span<const SequenceView> sequences, const DraftSettings& settings,
               std::span<DraftTree> trees) override;
  void set_drafts(int64_t count) override { drafts_ = std::min(count, max_drafts_); }
  int64_t max_drafts() const override { return max_drafts_; }

 private:
  int64_t max_drafts_, drafts_;
  std::vector<NgramIndex> indices_;
};

}  // namespace trainer

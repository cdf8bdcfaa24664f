#include "trainer/decode/drafters/ngram.h"

#include <algorithm>
#include <bit>

namespace trainer {

NgramIndex::NgramIndex(int64_t capacity) {
  const size_t slots = std::bit_ceil(static_cast<size_t>(std::max<int64_t>(capacity, 16)) * 4);
  mask_ = slots - 1;
  followers_.assign(slots * (kLongest - kShortest + 1), 0);
}

void NgramIndex::clear() {
  indexed_ = 0;
  std::fill(followers_.begin(), followers_.end(), 0);
}

// Slot of the n-gram whose last token is *last.
size_t NgramIndex::slot(const int32_t* last, int n) const {
  uint64_t hash = static_cast<uint64_t>(n);
  for (int i = 0; i < n; ++i) hash = (hash ^ static_cast<uint32_t>(last[-i])) * 0x9E3779B97F4A7C15u;
  return (n - kShortest) * (mask_ + 1) + ((hash >> 32) & mask_);
}

void NgramIndex::extend(std::span<const int32_t> tokens) {
  const int64_t end = static_cast<int64_t>(tokens.size()) - 1;  // the last n-gram has no follower yet
  for (; indexed_ < end; ++indexed_)
    for (int n = kShortest; n <= std::min<int64_t>(kLongest, indexed_ + 1); ++n)
      followers_[slot(tokens.data() + indexed_, n)] = static_cast<int32_t>(indexed_ + 1);
}

int64_t NgramIndex::find(std::span<const int32_t> tokens) const {
  const int64_t size = static_cast<int64_t>(tokens.size());
  for (int n = static_cast<int>(std::min<int64_t>(kLongest, size)); n >= kShortest; --n) {
    const int64_t follower = followers_[slot(tokens.data() + size - 1, n)];
    // The slot may be shared: compare the tokens themselves.
    if (follower >= n && std::equal(tokens.end() - n, tokens.end(), tokens.begin() + follower - n))
      return follower;
  }
  return -1;
}

NgramDrafter::NgramDrafter(const DrafterParams& params)
    : max_drafts_(params.max_drafts),
      drafts_(params.max_drafts),
      indices_(params.batch, NgramIndex(params.capacity)) {}

void NgramDrafter::reset(const Context&) {
  for (NgramIndex& index : indices_) index.clear();
}

void NgramDrafter::observe(const Context&, int64_t sequence, const SequenceView& view, const Tensor&,
                           std::span<const int32_t>, int64_t) {
  indices_[sequence].extend(view.tokens);
}

void NgramDrafter::propose(const Context&, std::span<const SequenceView> sequences, const DraftSettings&,
                           std::span<DraftTree> trees) {
  for (size_t b = 0; b < sequences.size(); ++b) {
    const SequenceView& view = sequences[b];
    if (!view.active) continue;
    const int64_t from = indices_[b].find(view.tokens);
    if (from < 0) continue;
    // Where the earlier occurrence overlaps the end, the text repeats: so do the drafts.
    const int64_t known = static_cast<int64_t>(view.tokens.size()) - from;
    const int64_t count = std::min({drafts_, view.max_depth, view.max_drafts});
    for (int64_t i = 0; i < count; ++i) trees[b].add(static_cast<int>(i), view.tokens[from + i % known]);
  }
}

}  // namespace trainer

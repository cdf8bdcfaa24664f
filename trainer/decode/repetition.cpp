#include "trainer/decode/repetition.h"

#include <algorithm>

namespace trainer {

bool repeats_run(std::span<const int32_t> tokens, int32_t next, int64_t length) {
  const int64_t before = length - 1, count = static_cast<int64_t>(tokens.size());
  const auto run = tokens.last(static_cast<size_t>(std::min(before, count)));
  for (int64_t i = 0; i + before < count; ++i)
    if (tokens[i + before] == next && std::equal(run.begin(), run.end(), tokens.begin() + i)) return true;
  return false;
}

int32_t without_repeats(std::span<const int32_t> tokens, std::span<const float> logits, int32_t choice,
                        int64_t length) {
  std::vector<bool> refused;
  int32_t best = choice;
  while (best >= 0 && repeats_run(tokens, best, length)) {
    refused.resize(logits.size());
    refused[best] = true;
    best = -1;
    for (int32_t i = 0; i < static_cast<int32_t>(logits.size()); ++i)
      if (!refused[i] && (best < 0 || logits[i] > logits[best])) best = i;
  }
  return best < 0 ? choice : best;
}

}  // namespace trainer

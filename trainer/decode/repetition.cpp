#include "trainer/decode/repetition.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/core/row_math.h"

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
  constexpr float kRefused = -std::numeric_limits<float>::infinity();
  std::vector<float> left;
  int32_t best = choice;
  while (repeats_run(tokens, best, length)) {
    if (left.empty()) left.assign(logits.begin(), logits.end());
    left[best] = kRefused;
    best = static_cast<int32_t>(kernels::row_argmax(left.data(), static_cast<int64_t>(left.size())));
    if (left[best] == kRefused) return choice;
  }
  return best;
}

}  // namespace trainer

#pragma once
// How many drafts are worth their cost. With reach[d] the probability that a step accepts at least d + 1
// drafts and drafted[d] that it has at least d + 1, a limit of g drafts gives
//   tokens per step  E(g) = 1 + sum of reach[d], d < g
//   cost of a step   C(g) = T(1) + sum over d < g of drafted[d] (T(d + 2) - T(d + 1)) + draft(g)
//   speedup          S(g) = E(g) T(1) / C(g)
// T(n): seconds of a step of n rows, measured on this machine for this model. For a tree, d counts its
// drafts, best first, and reach[d] is the probability that draft d is accepted.
#include <cstdint>
#include <vector>

#include "trainer/decode/decoder.h"

namespace trainer {

// T(n) for n = 1 to max_rows, in seconds.
std::vector<double> measure_step_costs(Decoder& decoder, int64_t max_rows, const DecodeSettings& settings);

// Seconds a drafter takes: `first` for one draft, `next` for each further one.
struct DraftCost {
  double first = 0, next = 0;
  double of(int64_t drafts) const { return drafts > 0 ? first + next * static_cast<double>(drafts - 1) : 0; }
};

struct AcceptanceEstimate {
  std::vector<double> reach, drafted;
};

struct DraftChoice {
  int64_t drafts = 0;            // the g of the largest S(g), at least 1 where any draft is possible
  double predicted_speedup = 1;  // S(drafts)
  std::vector<double> speedups;  // [g]: S(g), from g = 0
};
DraftChoice choose_drafts(const std::vector<double>& step_costs, const AcceptanceEstimate& estimate,
                          const DraftCost& draft, int64_t max_drafts);

// Measures a drafter on prompts: acceptance and draft cost at its most drafts and at one, then sets the
// number of drafts that choose_drafts finds.
DraftChoice tune_drafter(Decoder& decoder, Drafter& drafter, const std::vector<double>& step_costs,
                         const std::vector<std::vector<int32_t>>& prompts, const DecodeSettings& settings);

}  // namespace trainer

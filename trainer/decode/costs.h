#pragma once
// How many drafts are worth their cost. With reach[d] the probability that a step accepts draft d (of a
// chain: at least d + 1 drafts; of a tree: the draft at place d, best first) and drafted[d] that it has that
// draft, a limit of g drafts gives
//   tokens per step  E(g) = 1 + sum of reach[d], d < g
//   rows             R(g) = T(1) + sum over d < g of drafted[d] (T(d + 2) - T(d + 1))
//   cost of a step   C(g) = R(g) + rest(g), C(0) that of a plain step
//   speedup          S(g) = E(g) C(0) / C(g)
// T(n): seconds of a step of n rows, measured on this machine for this model, drafts and rule apart. rest(g):
// what real steps took beyond that. Every time is a median, so that a slow moment of the machine counts
// for none of them.
#include <cstdint>
#include <map>
#include <vector>

#include "trainer/decode/decoder.h"

namespace trainer {

// T(n) for n = 1 to max_rows, or to the last of learned positions, in seconds: the median of several rounds.
std::vector<double> measure_step_costs(Decoder& decoder, int64_t max_rows, const DecodeSettings& settings);

// rest(g), in seconds: drafting, and what the acceptance rule asks of the host (copies of probabilities and
// logits, draws, the guard against loops). By number of drafts where it was measured; in between a straight
// line, beyond the last of them as there, and 0 where nothing was. Negative where T(n) met a slower moment of
// the machine: what is compared are real steps, side by side.
struct RestCost {
  std::map<int64_t, double> measured;
  double of(int64_t drafts) const;
};

struct AcceptanceEstimate {
  std::vector<double> reach, drafted;
};
// From the steps of a run with `most` drafts.
AcceptanceEstimate estimate_acceptance(const DecodeRun& run, int64_t most);

// Seconds per step of real runs, one of each tuning prompt, by number of drafts.
using StepSeconds = std::map<int64_t, std::vector<double>>;
// Collects them: each run with drafts beside a plain one of the same prompt right before it, so that a slow
// moment of the machine meets both, and how many drafts are measured first does not matter.
class StepComparison {
 public:
  // Seconds of a step; 0 where a run had none, which is left out.
  void add(double plain, int64_t drafts, double drafted);
  // As if every plain step had taken what the median of them took.
  StepSeconds seconds() const;

 private:
  std::vector<double> plain_;
  std::map<int64_t, std::vector<double>> shares_;  // by number of drafts: of the plain step beside it
};
// The rest with which C(g) is the median of what was measured.
RestCost rest_cost(const std::vector<double>& step_costs, const AcceptanceEstimate& estimate,
                   const StepSeconds& measured);

struct DraftChoice {
  int64_t drafts = 0;            // the g of the largest S(g), at least 1 where any draft is possible
  double predicted_speedup = 1;  // S(drafts)
  std::vector<double> speedups;  // [g]: S(g), from g = 0
};
DraftChoice choose_drafts(const std::vector<double>& step_costs, const AcceptanceEstimate& estimate,
                          const RestCost& rest, int64_t max_drafts);

// Measures a drafter on prompts: acceptance at its most drafts, and what steps take with most of them, with
// one and in the plain decoding it is compared with; then with the number that choose_drafts finds, until it
// finds one that was measured. A tree's next level, say, may cost more than a straight line tells. Sets that
// number.
DraftChoice tune_drafter(Decoder& decoder, Drafter& drafter, const std::vector<double>& step_costs,
                         const std::vector<std::vector<int32_t>>& prompts, const DecodeSettings& settings);

}  // namespace trainer

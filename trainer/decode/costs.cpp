#include "trainer/decode/costs.h"

#include <algorithm>

namespace trainer {

std::vector<double> measure_step_costs(Decoder& decoder, int64_t max_rows, const DecodeSettings& settings) {
  constexpr int kRounds = 5, kRepeats = 8;
  // In the middle of a fold, or at its beginning where the rows would not fit before the next one.
  const auto length_for = [&](int64_t n) {
    for (const int64_t length : {kernels::kFold + kernels::kFold / 4, kernels::kFold})
      if (n <= rows_before_fold(length) && length + n <= decoder.position_limit()) return length;
    return int64_t{0};
  };
  std::vector<double> costs(max_rows, 1e30);
  for (int round = 0; round < kRounds; ++round)
    for (int64_t n = 1; n <= max_rows; ++n)
      costs[n - 1] = std::min(costs[n - 1], decoder.measure_step(n, length_for(n), kRepeats, settings));
  return costs;
}

DraftChoice choose_drafts(const std::vector<double>& step_costs, const AcceptanceEstimate& estimate,
                          const DraftCost& draft, int64_t max_drafts) {
  DraftChoice choice;
  choice.speedups.push_back(1);
  double tokens = 1, cost = step_costs[0];
  const int64_t most = std::min<int64_t>(
      {max_drafts, static_cast<int64_t>(estimate.reach.size()), static_cast<int64_t>(step_costs.size()) - 1});
  for (int64_t g = 1; g <= most; ++g) {
    tokens += estimate.reach[g - 1];
    cost += estimate.drafted[g - 1] * (step_costs[g] - step_costs[g - 1]);
    choice.speedups.push_back(tokens * step_costs[0] / (cost + draft.of(g)));
    if (g == 1 || choice.speedups[g] > choice.predicted_speedup) {
      choice.drafts = g;
      choice.predicted_speedup = choice.speedups[g];
    }
  }
  return choice;
}

namespace {

DecodeRun run_all(Decoder& decoder, Drafter& drafter, const std::vector<std::vector<int32_t>>& prompts,
                  const DecodeSettings& settings) {
  DecodeRun all;
  DecodeSettings seeded = settings;
  for (size_t p = 0; p < prompts.size(); ++p) {
    seeded.seed = text_seed(settings.seed, TextUse::tuning, 0, static_cast<int64_t>(p));
    all.add(decoder.run({&prompts[p], 1}, seeded, &drafter));
  }
  return all;
}

}  // namespace

DraftChoice tune_drafter(Decoder& decoder, Drafter& drafter, const std::vector<double>& step_costs,
                         const std::vector<std::vector<int32_t>>& prompts, const DecodeSettings& settings) {
  const int64_t most = drafter.max_drafts();
  drafter.set_drafts(1);
  const DecodeRun one = run_all(decoder, drafter, prompts, settings);
  drafter.set_drafts(most);
  const DecodeRun full = run_all(decoder, drafter, prompts, settings);
  const double steps = static_cast<double>(std::max<int64_t>(full.steps, 1));
  DraftCost cost;
  cost.first = one.times.draft / static_cast<double>(std::max<int64_t>(one.steps, 1));
  if (most > 1)
    cost.next = std::max(0.0, (full.times.draft / steps - cost.first) / static_cast<double>(most - 1));
  AcceptanceEstimate estimate;
  const std::vector<double> values = drafter.node_values();
  if (values.empty()) {
    for (int64_t d = 0; d < most; ++d) {
      estimate.reach.push_back(static_cast<double>(full.reached[d]) / steps);
      estimate.drafted.push_back(static_cast<double>(full.drafted[d]) / steps);
    }
  } else {
    // The tree's own estimates take levels as independent: scaled to what the whole tree gained.
    double total = 0;
    for (const double value : values) total += value;
    const double gained = static_cast<double>(full.tokens) / steps - 1;
    for (const double value : values) estimate.reach.push_back(total > 0 ? value * gained / total : 0);
    const double share = static_cast<double>(full.drafted[0]) / steps;
    estimate.drafted.assign(values.size(), share);
  }
  const DraftChoice choice = choose_drafts(step_costs, estimate, cost, most);
  drafter.set_drafts(choice.drafts);
  return choice;
}

}  // namespace trainer

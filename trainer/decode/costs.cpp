#include "trainer/decode/costs.h"

#include <algorithm>
#include <iterator>
#include <set>

#include "trainer/decode/spread.h"

namespace trainer {

std::vector<double> measure_step_costs(Decoder& decoder, int64_t max_rows, const DecodeSettings& settings) {
  constexpr int kRounds = 5, kRepeats = 8;
  max_rows = std::min(max_rows, decoder.position_limit());
  // In the middle of a fold, or at its beginning where the rows would not fit before the next one.
  const auto length_for = [&](int64_t n) {
    for (const int64_t length : {kernels::kFold + kernels::kFold / 4, kernels::kFold})
      if (n <= rows_before_fold(length) && length + n <= decoder.position_limit()) return length;
    return int64_t{0};
  };
  std::vector<std::vector<double>> rounds(max_rows);
  for (int round = 0; round < kRounds; ++round)
    for (int64_t n = 1; n <= max_rows; ++n)
      rounds[n - 1].push_back(decoder.measure_step(n, length_for(n), kRepeats, settings));
  std::vector<double> costs;
  for (std::vector<double>& seconds : rounds) costs.push_back(spread_of(std::move(seconds)).median);
  return costs;
}

namespace {

// R(g) for g = 0 to `most`, or as far as there are costs.
std::vector<double> rows_costs(const std::vector<double>& step_costs, const AcceptanceEstimate& estimate,
                               int64_t most) {
  most = std::min<int64_t>(
      {most, static_cast<int64_t>(estimate.reach.size()), static_cast<int64_t>(step_costs.size()) - 1});
  std::vector<double> costs = {step_costs[0]};
  for (int64_t g = 1; g <= most; ++g)
    costs.push_back(costs.back() + estimate.drafted[g - 1] * (step_costs[g] - step_costs[g - 1]));
  return costs;
}

}  // namespace

double RestCost::of(int64_t drafts) const {
  const auto above = measured.lower_bound(drafts);
  if (above == measured.end()) return measured.empty() ? 0 : measured.rbegin()->second;
  if (above->first == drafts || above == measured.begin()) return above->second;
  const auto below = std::prev(above);
  const double share =
      static_cast<double>(drafts - below->first) / static_cast<double>(above->first - below->first);
  return below->second + share * (above->second - below->second);
}

RestCost rest_cost(const std::vector<double>& step_costs, const AcceptanceEstimate& estimate,
                   const StepSeconds& measured) {
  const std::vector<double> rows =
      rows_costs(step_costs, estimate, static_cast<int64_t>(estimate.drafted.size()));
  RestCost rest;
  for (const auto& [drafts, seconds] : measured) {
    if (seconds.empty()) continue;
    const size_t at = std::min(static_cast<size_t>(drafts), rows.size() - 1);
    rest.measured[drafts] = spread_of(seconds).median - rows[at];
  }
  return rest;
}

DraftChoice choose_drafts(const std::vector<double>& step_costs, const AcceptanceEstimate& estimate,
                          const RestCost& rest, int64_t max_drafts) {
  const std::vector<double> rows = rows_costs(step_costs, estimate, max_drafts);
  const double plain = rows[0] + rest.of(0);
  DraftChoice choice;
  choice.speedups.push_back(1);
  double tokens = 1;
  for (int64_t g = 1; g < static_cast<int64_t>(rows.size()); ++g) {
    tokens += estimate.reach[g - 1];
    choice.speedups.push_back(tokens * plain / (rows[g] + rest.of(g)));
    if (g == 1 || choice.speedups[g] > choice.predicted_speedup) {
      choice.drafts = g;
      choice.predicted_speedup = choice.speedups[g];
    }
  }
  return choice;
}

void StepComparison::add(double plain, int64_t drafts, double drafted) {
  if (!(plain > 0 && drafted > 0)) return;
  plain_.push_back(plain);
  shares_[drafts].push_back(drafted / plain);
}

StepSeconds StepComparison::seconds() const {
  StepSeconds all{{0, plain_}};
  const double plain = spread_of(plain_).median;
  for (const auto& [drafts, shares] : shares_)
    for (const double share : shares) all[drafts].push_back(share * plain);
  return all;
}

AcceptanceEstimate estimate_acceptance(const DecodeRun& run, int64_t most) {
  const double steps = static_cast<double>(std::max<int64_t>(run.steps, 1));
  AcceptanceEstimate estimate;
  for (int64_t d = 0; d < most; ++d) {
    estimate.reach.push_back(static_cast<double>(run.accepted[d]) / steps);
    estimate.drafted.push_back(static_cast<double>(run.drafted[d]) / steps);
  }
  return estimate;
}

namespace {

// 0 where the prompt's first token ended the text.
double seconds_of_step(const DecodeRun& run) {
  return run.steps > 0 ? run.seconds() / static_cast<double>(run.steps) : 0;
}

}  // namespace

DraftChoice tune_drafter(Decoder& decoder, Drafter& drafter, const std::vector<double>& step_costs,
                         const std::vector<std::vector<int32_t>>& prompts, const DecodeSettings& settings) {
  const int64_t most = drafter.max_drafts();
  DecodeSettings drafted = settings, plain = settings;
  if (plain.acceptance == Acceptance::typical) plain.acceptance = Acceptance::rejection;
  StepComparison steps;
  const auto measure = [&](int64_t drafts) {
    DecodeRun all;
    drafter.set_drafts(drafts);
    for (size_t p = 0; p < prompts.size(); ++p) {
      const std::span<const std::vector<int32_t>> prompt(&prompts[p], 1);
      drafted.seed = plain.seed = text_seed(settings.seed, TextUse::tuning, 0, static_cast<int64_t>(p));
      const double beside = seconds_of_step(decoder.run(prompt, plain));
      const DecodeRun run = decoder.run(prompt, drafted, &drafter);
      steps.add(beside, drafts, seconds_of_step(run));
      all.add(run);
    }
    return all;
  };
  const AcceptanceEstimate estimate = estimate_acceptance(measure(most), most);
  std::set<int64_t> measured = {0, most};
  DraftChoice choice;
  choice.drafts = std::min<int64_t>(1, most);
  while (true) {
    if (measured.insert(choice.drafts).second) measure(choice.drafts);
    choice = choose_drafts(step_costs, estimate, rest_cost(step_costs, estimate, steps.seconds()), most);
    if (measured.contains(choice.drafts)) break;
  }
  drafter.set_drafts(choice.drafts);
  return choice;
}

}  // namespace trainer

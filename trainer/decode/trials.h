#pragma once
// Timed decoding of held-out prompts: every way of decoding in turn, round after round, so that a slow moment
// of the machine meets all of them.
#include <optional>

#include "data/dataset.h"
#include "trainer/decode/costs.h"
#include "trainer/decode/spread.h"

namespace trainer {

// One way of decoding.
struct Trial {
  std::string drafter, shape;  // "none" is plain decoding
  DecodeSettings settings;
  int64_t drafts = 0;
  DraftChoice choice;
  std::unique_ptr<Drafter> engine;

  // Filled by run_trials.
  std::vector<double> tokens_per_second;  // of each round, over all prompts
  std::vector<double> first_token_ms;     // of each prompt and round
  DecodeRun totals;                       // counts and times over all prompts and rounds
  std::vector<DecodedSequence> texts;     // of each prompt, round after round
  bool identical = true;                  // texts equal those of the first trial, in every round

  Spread speed() const { return spread_of(tokens_per_second); }
};

struct Prompt {
  std::vector<int32_t> tokens;
  std::vector<int32_t> continuation;  // what the document itself goes on with
};
// Prompts of `tokens` tokens from the middle of validation documents, spread evenly over those that go on for
// `continuation` tokens more, or else over those that are long enough; fewer where there are fewer.
std::vector<Prompt> choose_prompts(const data::TokenDataset& dataset, int64_t count, int64_t tokens,
                                   int64_t continuation);
// The guard against loops that decode.no_repeat = -1 stands for: of a few lengths the one with which plain
// greedy text after these prompts repeats itself as much as real text does (distinct-4 nearest to `target`).
int64_t choose_no_repeat(Decoder& decoder, const std::vector<std::vector<int32_t>>& prompts,
                         DecodeSettings settings, double target);
// Trials in order of the configuration: plain decoding for every temperature first (greedy always), then
// every drafter with every acceptance rule. Drafters are tuned on the tuning prompts.
std::vector<Trial> make_trials(Decoder& decoder, const configs::Config& config, int32_t end_of_text,
                               const std::vector<std::vector<int32_t>>& tuning_prompts,
                               const std::vector<double>& step_costs, int64_t no_repeat,
                               const std::function<void(const std::string&)>& progress);
// Texts above temperature 0 are others in every round, and for one prompt and round drawn with the same
// random numbers in every trial.
void run_trials(Decoder& decoder, std::vector<Trial>& trials,
                const std::vector<std::vector<int32_t>>& prompts, int64_t rounds,
                const std::function<void(const std::string&)>& progress);
// The plain trial a trial is measured against: same temperature.
const Trial& baseline_of(const std::vector<Trial>& trials, const Trial& trial);
// Ratio to the baseline, round by round.
Spread speedup(const Trial& trial, const Trial& baseline);
// Share of different ones among the sequences of 4 tokens of a text, averaged over texts: low where text
// loops.
double distinct_4(const std::vector<std::vector<int32_t>>& texts);
double distinct_4(const std::vector<DecodedSequence>& texts);

}  // namespace trainer

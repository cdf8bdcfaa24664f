#include "trainer/decode/trials.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "trainer/decode/drafters/medusa.h"

namespace trainer {

std::vector<Prompt> choose_prompts(const data::TokenDataset& dataset, int64_t count, int64_t tokens,
                                   int64_t continuation) {
  std::vector<int64_t> usable;
  for (const int64_t length : {tokens + continuation, tokens}) {
    if (!usable.empty()) break;
    for (int64_t d = 0; d < dataset.documents(); ++d)
      if (static_cast<int64_t>(dataset.document(d).size()) >= length) usable.push_back(d);
  }
  std::vector<Prompt> prompts;
  const int64_t n = std::min<int64_t>(count, static_cast<int64_t>(usable.size()));
  for (int64_t i = 0; i < n; ++i) {
    const auto document = dataset.document(usable[i * static_cast<int64_t>(usable.size()) / n]);
    const int64_t size = static_cast<int64_t>(document.size()),
                  from = std::max<int64_t>(0, size - tokens - continuation) / 2, split = from + tokens,
                  end = std::min(size, split + continuation);
    prompts.push_back({{document.begin() + from, document.begin() + split},
                       {document.begin() + split, document.begin() + end}});
  }
  if (prompts.empty())
    throw kernels::DataError(
        fmt::format("no validation document has {} tokens for a prompt: lower decode.prompt_tokens", tokens));
  return prompts;
}

namespace {

std::vector<double> temperatures(const configs::DecodeConfig& config) {
  std::vector<double> values;
  for (const std::string& word : configs::split_list(config.temperature))
    values.push_back(configs::parse_temperature(word));
  return values;
}

// Greedy decodes at temperature 0, the other rules above it.
std::vector<std::pair<Acceptance, double>> rules(const configs::DecodeConfig& config) {
  std::vector<std::pair<Acceptance, double>> rules;
  for (const std::string& word : configs::split_list(config.acceptance)) {
    const Acceptance acceptance = parse_acceptance(word);
    if (acceptance == Acceptance::greedy) rules.emplace_back(acceptance, 0.0);
    for (const double t : temperatures(config))
      if (acceptance != Acceptance::greedy && t > 0) rules.emplace_back(acceptance, t);
  }
  return rules;
}

Trial plain_trial(DecodeSettings settings, double temperature) {
  Trial trial;
  trial.drafter = "none";
  trial.shape = "chain";
  settings.temperature = temperature;
  settings.acceptance = temperature > 0 ? Acceptance::rejection : Acceptance::greedy;
  trial.settings = settings;
  return trial;
}

// How often each Medusa head's candidates come true in what the model itself writes after the prompts.
std::vector<std::vector<double>> measure_acceptance(Decoder& decoder,
                                                    const std::vector<std::vector<int32_t>>& prompts,
                                                    const DecodeSettings& settings) {
  MedusaProbe probe(decoder.context(), decoder.model());
  DecodeSettings write = settings, read = settings;
  read.max_tokens = 1;
  for (size_t p = 0; p < prompts.size(); ++p) {
    write.seed = text_seed(settings.seed, TextUse::calibration, 0, static_cast<int64_t>(p));
    std::vector<int32_t> text = prompts[p];
    const std::vector<int32_t> written = decoder.run({&prompts[p], 1}, write).sequences[0].tokens;
    text.insert(text.end(), written.begin(), written.end() - 1);
    // Reading it ends with a token of its own, which learned positions have no room for after a full context.
    text.resize(std::min(text.size(), static_cast<size_t>(decoder.position_limit()) - 1));
    probe.count_from(static_cast<int64_t>(prompts[p].size()));
    decoder.run({&text, 1}, read, &probe);
  }
  return probe.acceptance();
}

}  // namespace

std::vector<Trial> make_trials(Decoder& decoder, const configs::Config& all, int32_t end_of_text,
                               const std::vector<std::vector<int32_t>>& tuning_prompts,
                               const std::vector<double>& step_costs, int64_t no_repeat,
                               const std::function<void(const std::string&)>& progress) {
  const configs::DecodeConfig& config = all.decode;
  DecodeSettings settings;
  settings.no_repeat = no_repeat;
  settings.typical_epsilon = config.typical_epsilon;
  settings.typical_delta = config.typical_delta;
  settings.seed = static_cast<uint64_t>(config.seed);
  settings.end_of_text = end_of_text;
  settings.max_tokens = config.max_tokens;
  std::vector<Trial> trials;
  trials.push_back(plain_trial(settings, 0));
  for (const double t : temperatures(config))
    if (t > 0) trials.push_back(plain_trial(settings, t));
  for (const std::string& name : configs::drafters_to_evaluate(all)) {
    const DrafterKind& kind = find_drafter(name, decoder.model().config());
    for (const auto& [acceptance, temperature] : rules(config)) {
      Trial trial = plain_trial(settings, temperature);
      trial.drafter = name;
      trial.shape = kind.shape;
      trial.settings.acceptance = acceptance;
      trial.engine = make_drafter(decoder, name, config);
      if (!trial.engine->node_values().empty())
        trial.engine->calibrate(
            measure_acceptance(decoder, tuning_prompts, plain_trial(settings, temperature).settings));
      trial.choice = tune_drafter(decoder, *trial.engine, step_costs, tuning_prompts, trial.settings);
      trial.drafts = trial.choice.drafts;
      progress(fmt::format("{} ({}, temperature {:g}): {} drafts a step, predicted speedup {:.2f}", name,
                           to_string(acceptance), temperature, trial.drafts, trial.choice.predicted_speedup));
      trials.push_back(std::move(trial));
    }
  }
  return trials;
}

namespace {

// Decodes one prompt and returns what it took. `reference`: the texts of the first trial, which is run first.
DecodeRun run_prompt(Decoder& decoder, Trial& trial, const std::vector<int32_t>& prompt, uint64_t seed,
                     const std::vector<DecodedSequence>& reference) {
  DecodeSettings settings = trial.settings;
  settings.seed = seed;
  DecodeRun run = decoder.run({&prompt, 1}, settings, trial.engine.get());
  trial.first_token_ms.push_back(run.prefill_seconds * 1e3);
  trial.totals.add(run);
  trial.texts.push_back(run.sequences[0]);
  trial.identical = trial.identical && trial.texts.back().tokens == reference[trial.texts.size() - 1].tokens;
  return run;
}

}  // namespace

// Every way decodes a prompt before the next one: a slow moment of the machine meets all of them.
void run_trials(Decoder& decoder, std::vector<Trial>& trials,
                const std::vector<std::vector<int32_t>>& prompts, int64_t rounds,
                const std::function<void(const std::string&)>& progress) {
  for (int64_t round = 0; round < rounds; ++round) {
    std::vector<DecodeRun> sums(trials.size());
    for (size_t p = 0; p < prompts.size(); ++p)
      for (size_t t = 0; t < trials.size(); ++t) {
        const uint64_t seed =
            text_seed(trials[t].settings.seed, TextUse::timing, round, static_cast<int64_t>(p));
        sums[t].add(run_prompt(decoder, trials[t], prompts[p], seed, trials.front().texts));
      }
    for (size_t t = 0; t < trials.size(); ++t)
      trials[t].tokens_per_second.push_back(
          sums[t].seconds() > 0 ? static_cast<double>(sums[t].tokens) / sums[t].seconds() : 0);
    progress(fmt::format("decoding: round {} of {}, {} ways of decoding, {} prompts", round + 1, rounds,
                         trials.size(), prompts.size()));
  }
}

const Trial& baseline_of(const std::vector<Trial>& trials, const Trial& trial) {
  for (const Trial& plain : trials)
    if (plain.drafter == "none" && plain.settings.temperature == trial.settings.temperature) return plain;
  return trials.front();
}

Spread speedup(const Trial& trial, const Trial& baseline) {
  std::vector<double> ratios;
  for (size_t i = 0; i < trial.tokens_per_second.size(); ++i)
    if (baseline.tokens_per_second[i] > 0)
      ratios.push_back(trial.tokens_per_second[i] / baseline.tokens_per_second[i]);
  return spread_of(ratios);
}

double distinct_4(const std::vector<std::vector<int32_t>>& texts) {
  constexpr int64_t kLength = 4;
  double sum = 0;
  int64_t counted = 0;
  for (const std::vector<int32_t>& text : texts) {
    const int64_t all = static_cast<int64_t>(text.size()) - kLength + 1;
    if (all < 1) continue;
    std::set<std::vector<int32_t>> seen;
    for (int64_t i = 0; i < all; ++i) seen.emplace(text.begin() + i, text.begin() + i + kLength);
    sum += static_cast<double>(seen.size()) / static_cast<double>(all);
    ++counted;
  }
  return counted > 0 ? sum / static_cast<double>(counted) : 1;
}

double distinct_4(const std::vector<DecodedSequence>& texts) {
  std::vector<std::vector<int32_t>> tokens;
  for (const DecodedSequence& text : texts) tokens.push_back(text.tokens);
  return distinct_4(tokens);
}

int64_t choose_no_repeat(Decoder& decoder, const std::vector<std::vector<int32_t>>& prompts,
                         DecodeSettings settings, double target) {
  int64_t best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (const int64_t length : {0, 32, 24, 16, 12, 8, 6, 5, 4}) {
    settings.no_repeat = length;
    std::vector<DecodedSequence> texts;
    for (const std::vector<int32_t>& prompt : prompts)
      texts.push_back(std::move(decoder.run({&prompt, 1}, settings).sequences[0]));
    const double distance = std::abs(distinct_4(texts) - target);
    if (distance < least) best = length;
    least = std::min(least, distance);
  }
  return best;
}

}  // namespace trainer

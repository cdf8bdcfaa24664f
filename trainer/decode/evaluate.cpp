#include "trainer/decode/evaluate.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <ctime>

#include "data/files.h"
#include "data/ngram.h"
#include "kernels/core/error.h"
#include "trainer/decode/perplexity.h"
#include "trainer/decode/report.h"
#include "trainer/decode/text_stream.h"

namespace trainer {

namespace {

using Progress = std::function<void(const std::string&)>;

std::string describe_model(const LoadedModel& loaded) {
  const configs::ModelConfig& m = loaded.config.model;
  const configs::HeadsConfig& h = loaded.config.heads;
  return fmt::format(
      "{} layers, width {}, {} heads, attention {}, vocabulary {}, Medusa heads {}{}, MTP depths {}, "
      "{:.1f} million parameters, {}",
      m.layers, m.width, m.heads, m.attention, loaded.model->vocabulary(), h.medusa,
      h.medusa > 0 && h.medusa_sequential ? " (sequential)" : "", h.mtp,
      static_cast<double>(loaded.model->parameters().elements()) / 1e6, loaded.config.precision.compute);
}

// Token numbers of another tokenizer would be measured without complaint, and mean nothing.
void check_tokenizer(const LoadedModel& loaded) {
  const std::string& path = loaded.config.data.path;
  if (data::read_dataset_info(path).tokenizer_hash == loaded.tokenizer->hash()) return;
  throw kernels::CheckpointError(
      fmt::format("{} was trained with another tokenizer than the data in {}: point data.path at the folder "
                  "it was trained on, or prepare the data with --tokenizer of that folder",
                  loaded.checkpoint.string(), path));
}

void add_perplexity(const Context& ctx, const LoadedModel& loaded, const data::TokenDataset& validation,
                    Report& report) {
  const Perplexity found = measure_perplexity(ctx, loaded, validation, loaded.config.decode.batches);
  report.validation_perplexity = found.perplexity;
  report.validation_bits_per_byte = found.bits_per_byte;
  report.validation_tokens = found.tokens;
  for (size_t i = 0; i < found.losses.size(); ++i)
    report.validation_losses.emplace_back(loaded.model->losses()[i].name, found.losses[i]);
}

// Byte n-gram models of the training text, for scale.
void add_anchors(const LoadedModel& loaded, const data::TokenDataset& validation, const Progress& progress,
                 Report& report) {
  constexpr int64_t kMaxBytes = int64_t{64} << 20;  // more text changes the figures little and takes minutes
  const data::TokenDataset train(loaded.config.data.path, "train", loaded.config.model.context);
  const auto train_text = data::document_texts(train, *loaded.tokenizer, kMaxBytes);
  const auto validation_text = data::document_texts(validation, *loaded.tokenizer, kMaxBytes);
  for (const auto& score : data::ngram_bits_per_byte(train_text, validation_text, {1, 2, 3, 5}))
    report.anchors.push_back(
        {score.order == 1 ? "unigram" : fmt::format("order {}", score.order), score.bits_per_byte});
  std::string found = "n-gram models of the training text, bits per byte:";
  for (const TextAnchor& anchor : report.anchors)
    found += fmt::format(" {} {:.3f}", anchor.model, anchor.bits_per_byte);
  progress(found);
}

// The text a drafter wrote after the first prompt, piece by piece as its steps gained it.
void add_sample(const LoadedModel& loaded, const std::vector<Trial>& trials,
                const std::vector<std::vector<int32_t>>& prompts, Report& report) {
  const Trial* best = &trials.front();
  for (const Trial& trial : trials)
    if (trial.settings.acceptance == Acceptance::greedy && trial.speed().median > best->speed().median)
      best = &trial;
  report.sample_drafter = best->drafter;
  TextStream prompt_stream(*loaded.tokenizer, {});
  report.sample_prompt = prompt_stream.add(prompts.front()) + prompt_stream.finish();
  TextStream stream(*loaded.tokenizer, prompts.front());
  const DecodedSequence& text = best->texts.front();
  size_t at = 0;
  for (const int64_t gained : text.gained) {
    report.sample.push_back({stream.add(std::span(text.tokens).subspan(at, gained)), gained});
    at += gained;
  }
  report.sample.push_back({stream.finish(), 0});
}

struct Prompts {
  std::vector<std::vector<int32_t>> timed, tuning, continuations;
};

// Prompts for tuning are others than those that are timed, where there are enough documents.
Prompts split_prompts(const data::TokenDataset& validation, const configs::DecodeConfig& config) {
  const int64_t tuning = std::min<int64_t>(8, config.prompts);
  Prompts prompts;
  std::vector<std::vector<int32_t>> all;
  for (Prompt& prompt :
       choose_prompts(validation, config.prompts + tuning, config.prompt_tokens, config.max_tokens)) {
    all.push_back(std::move(prompt.tokens));
    prompts.continuations.push_back(std::move(prompt.continuation));
  }
  const int64_t spare = std::max<int64_t>(0, static_cast<int64_t>(all.size()) - config.prompts);
  if (spare == 0) {
    prompts.timed = prompts.tuning = std::move(all);
    return prompts;
  }
  // Every n-th, so that both sets span the whole split.
  const int64_t every = static_cast<int64_t>(all.size()) / spare;
  for (int64_t i = 0; i < static_cast<int64_t>(all.size()); ++i) {
    const bool tune = i % every == every - 1 && static_cast<int64_t>(prompts.tuning.size()) < spare;
    (tune ? prompts.tuning : prompts.timed).push_back(std::move(all[i]));
  }
  return prompts;
}

void add_decoding(const Context& ctx, const LoadedModel& loaded, const data::TokenDataset& validation,
                  const Progress& progress, Report& report) {
  const configs::DecodeConfig& config = loaded.config.decode;
  const Prompts prompts = split_prompts(validation, config);
  Decoder decoder(ctx, *loaded.model, 1,
                  std::max(config.prompt_tokens + config.max_tokens, 2 * kernels::kFold));
  DecodeSettings plain;
  plain.max_tokens = config.max_tokens;
  decoder.run({prompts.tuning.data(), 1}, plain);  // caches and threads get warm
  const int64_t most_rows = std::min<int64_t>(
      std::max({config.max_drafts, config.tree_nodes, int64_t{15}}) + 1, kernels::kMaxDecodeRows);
  const std::vector<double> costs = measure_step_costs(decoder, most_rows, plain);
  for (const double seconds : costs) report.step_cost_ms.push_back(seconds * 1e3);
  report.text_distinct_4 = distinct_4(prompts.continuations);
  report.no_repeat = config.no_repeat;
  if (config.no_repeat < 0) {
    report.no_repeat = choose_no_repeat(decoder, prompts.tuning, plain, report.text_distinct_4);
    progress(fmt::format(
        "guard against loops: {} greedy text repeats itself as much as the held-out text (distinct-4 {:.2f})",
        report.no_repeat > 0 ? fmt::format("no run of {} tokens twice, with which", report.no_repeat)
                             : "none, without one",
        report.text_distinct_4));
  }
  std::vector<Trial> trials = make_trials(decoder, loaded.config, loaded.tokenizer->end_of_text(),
                                          prompts.tuning, costs, report.no_repeat, progress);
  run_trials(decoder, trials, prompts.timed, config.repeats, progress);

  report.baseline = trials.front().speed();
  report.baseline_first_token_ms = spread_of(trials.front().first_token_ms).median;
  report.baseline_distinct_4 = distinct_4(trials.front().texts);
  report.weight_bytes = loaded.model->decode_weight_bytes();
  report.prompts = static_cast<int64_t>(prompts.timed.size());
  report.prompt_tokens = config.prompt_tokens;
  report.max_tokens = config.max_tokens;
  report.rounds = config.repeats;
  for (const Trial& trial : trials) report.results.push_back(summarise(trial, trials));
  add_sample(loaded, trials, prompts.timed, report);
}

}  // namespace

void evaluate(const Context& ctx, LoadedModel& loaded, const std::filesystem::path& run,
              const std::filesystem::path& output, const Progress& progress) {
  check_writable(output);
  const data::TokenDataset validation(loaded.config.data.path, "validation", loaded.config.model.context);
  if (validation.samples() == 0)
    throw kernels::DataError(fmt::format(
        "{} holds no text for validation, of which an evaluation is made: prepare it with --val-fraction or "
        "--validation-input",
        loaded.config.data.path));
  check_tokenizer(loaded);
  Report report;
  report.checkpoint = loaded.checkpoint.string();
  report.step = loaded.step;
  report.run = run.string();
  report.device = kernels::describe(ctx.device);
  report.date = fmt::format("{:%Y-%m-%d %H:%M} UTC", fmt::gmtime(std::time(nullptr)));
  report.model = describe_model(loaded);
  add_perplexity(ctx, loaded, validation, report);
  const std::optional<double>& bits = report.validation_bits_per_byte;
  progress(fmt::format("validation: perplexity {:.2f}{} over {} tokens", report.validation_perplexity,
                       bits ? fmt::format(", {:.3f} bits per byte", *bits) : "", report.validation_tokens));
  if (bits)
    add_anchors(loaded, validation, progress, report);
  else
    progress(kNoBitsPerByte);
  add_decoding(ctx, loaded, validation, progress, report);
  report.training = read_training(run);
  data::write_whole(output / "report.html", report_html(report));
  data::write_whole(output / "report.json", report_json(report));
  progress(
      fmt::format("wrote {} and {}", (output / "report.json").string(), (output / "report.html").string()));
}

}  // namespace trainer

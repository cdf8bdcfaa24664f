#pragma once
// What an evaluation found, and its three forms: report.json, a table for the terminal, report.html.
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "trainer/decode/trials.h"

namespace trainer {

struct ReportResult {
  std::string drafter, shape, acceptance;
  double temperature = 0;
  int64_t batch = 1, drafts = 0;
  Spread tokens_per_second, speedup;
  double mean_accepted_length = 0;             // tokens per step, the bonus token included
  std::vector<double> acceptance_by_position;  // [d]: of the drafts tried at depth d + 1
  PhaseTimes time_ms;                          // of one step
  double time_to_first_token_ms = 0, distinct_4 = 0;
  std::optional<bool> identical_to_baseline;  // greedy only
  double predicted_speedup = 1;
  std::vector<double> predicted_speedups;  // [g]: with at most g drafts
};

struct TextAnchor {
  std::string model;  // "order 3"
  double bits_per_byte = 0;
};

// A piece of generated text that one step gained.
struct TextPiece {
  std::string text;
  int64_t tokens = 0;
};

struct TrainingPoint {
  double step = 0, loss = 0, loss_scale = 0;
  bool skipped = false;
  std::vector<std::pair<std::string, double>> losses;  // of the heads
};

struct Report {
  std::string checkpoint, device, date, model, run;
  int64_t step = 0;
  double validation_perplexity = 0;
  std::optional<double> validation_bits_per_byte;  // none, and no anchors: loss weights leave tokens out
  int64_t validation_tokens = 0;
  std::vector<std::pair<std::string, double>> validation_losses;
  std::vector<TextAnchor> anchors;
  Spread baseline;  // tokens per second, plain, greedy
  double baseline_first_token_ms = 0, baseline_distinct_4 = 0;
  double text_distinct_4 = 0;        // of what the documents themselves go on with after the prompts
  int64_t no_repeat = 0;             // the guard against loops in greedy text; 0: none
  int64_t weight_bytes = 0;          // read by a plain step
  std::vector<double> step_cost_ms;  // [n - 1]: a step of n rows
  std::vector<ReportResult> results;
  int64_t prompts = 0, prompt_tokens = 0, max_tokens = 0, rounds = 0;
  std::string sample_drafter, sample_prompt;
  std::vector<TextPiece> sample;
  std::vector<TrainingPoint> training;
};

// Why a report has neither bits per byte nor n-gram models beside them.
inline constexpr const char* kNoBitsPerByte =
    "no bits per byte, and no n-gram models beside them: only some tokens of this data are learned (prompts, "
    "for instance, are not), and their bytes are not counted apart";

ReportResult summarise(const Trial& trial, const std::vector<Trial>& trials);
// Lines of RUN/metrics.jsonl; none where there is no such file.
std::vector<TrainingPoint> read_training(const std::filesystem::path& run);
std::string report_json(const Report& report);
std::string report_html(const Report& report);
// DataError where data::write_whole could not write into this folder, there or not: something else has its
// name, or what is to hold it may not be written. Creates nothing.
void check_writable(const std::filesystem::path& folder);

}  // namespace trainer

#pragma once
// Speculative decoding: one text, or a measured comparison of drafters.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "configs/config.h"
#include "kernels/core/context.h"
#include "trainer/model/load.h"

namespace trainer {

// Validation perplexity, bits per byte and n-gram anchors (where every token is learned), the plain baseline
// and every (drafter, acceptance, temperature); writes report.json and report.html into `output` (complete or
// absent). DataError before anything is measured where that cannot be written. `progress` gets one line per
// finished part.
void evaluate(const Context& ctx, LoadedModel& loaded, const std::filesystem::path& run,
              const std::filesystem::path& output, const std::function<void(const std::string&)>& progress);
// The table printed after an evaluation, from report.json.
std::string report_table(const std::filesystem::path& report_json);

struct GenerateOptions {
  std::string prompt;
  int64_t max_tokens = 128;
  std::string drafter = "none";  // none | a name of drafters()
  std::string acceptance = "greedy";
  double temperature = 0;
  uint64_t seed = 1;
};
struct Generated {
  std::string text;
  int64_t tokens = 0;
  int64_t steps = 0, step_tokens = 0;  // after the first token, which reading the prompt gives
  double seconds = 0;                  // of those steps
  std::vector<int64_t> accepted;       // tokens gained: by the prompt, then by each step
};
// `on_text` receives the text of each step as it is accepted, and how many tokens the step gained.
Generated generate(const Context& ctx, LoadedModel& loaded, const GenerateOptions& options,
                   const std::function<void(const std::string&, int64_t)>& on_text);

}  // namespace trainer

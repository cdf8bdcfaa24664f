#pragma once
// What launch itself keeps in a run directory: status.json and samples.txt.
#include <cstdint>
#include <filesystem>
#include <string>

namespace launch {

struct RunStatus {
  std::string state;  // running | finished | stopped | failed
  int64_t step = 0;
  int exit_code = 0;
  std::string reason;
};

// Replaces RUN/status.json in one move; a run directory that cannot be written is only warned about.
void write_status(const std::filesystem::path& run, const RunStatus& status);
// The step of the last line of RUN/metrics.jsonl; 0 where there is none.
int64_t last_logged_step(const std::filesystem::path& run);
// The run a checkpoint belongs to: RUN for RUN/checkpoints/step_N, else the folder around it.
std::filesystem::path run_of(const std::filesystem::path& checkpoint);

}  // namespace launch

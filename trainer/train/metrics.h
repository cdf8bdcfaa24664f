#pragma once
// What a run tells: metrics.jsonl for programs, a progress line for people. Rank 0 only.
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "trainer/train/step.h"

namespace trainer {

// The step of a line of metrics.jsonl; -1 where it is none, as of a line that was cut short.
int64_t step_of_line(const std::string& line);

class MetricsLog {
 public:
  // Opens RUN/metrics.jsonl. Lines of step `from_step` and later, left by a run that was cut short, are
  // dropped.
  MetricsLog(const std::filesystem::path& run, int64_t from_step, int64_t total_steps, int64_t print_every,
             std::vector<std::string> loss_names, bool progress_bar);
  ~MetricsLog();
  MetricsLog(const MetricsLog&) = delete;
  MetricsLog& operator=(const MetricsLog&) = delete;

  void step(const StepMetrics& metrics, int64_t tokens_so_far);
  void validation(int64_t step, const std::vector<double>& losses);
  // A line of its own, above the progress bar where there is one.
  void note(const std::string& text);
  void flush();

 private:
  void print(const StepMetrics& metrics, double tokens_per_second);

  std::FILE* file_ = nullptr;
  int64_t from_step_, total_steps_, print_every_;
  std::vector<std::string> loss_names_;
  bool bar_;
  std::chrono::steady_clock::time_point start_, last_, last_print_;
  double tokens_since_print_ = 0;
};

}  // namespace trainer

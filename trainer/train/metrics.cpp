#include "trainer/train/metrics.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <sstream>

#include "data/files.h"
#include "kernels/core/error.h"

namespace trainer {

namespace {

using Clock = std::chrono::steady_clock;
double seconds(Clock::duration d) { return std::chrono::duration<double>(d).count(); }

// "3 min 20 s", "45 s", "2 h 5 min".
std::string duration(double s) {
  const int64_t t = static_cast<int64_t>(s + 0.5);
  if (t < 60) return fmt::format("{} s", t);
  if (t < 3600) return fmt::format("{} min {} s", t / 60, t % 60);
  return fmt::format("{} h {} min", t / 3600, t / 60 % 60);
}

// Keeps the lines of steps before `from_step`, and of validations after that many; a last line cut short by a
// kill is dropped too.
std::string kept_lines(const std::filesystem::path& file, int64_t from_step) {
  if (!std::filesystem::exists(file)) return "";
  std::istringstream in(data::read_file(file));
  std::string line, kept;
  while (std::getline(in, line)) {
    const int64_t step = step_of_line(line);
    const bool validation = line.find("\"validation_loss\"") != std::string::npos;
    if (step >= 0 && step < from_step + validation) kept += line + "\n";
  }
  return kept;
}

}  // namespace

int64_t step_of_line(const std::string& line) {
  const auto json = nlohmann::json::parse(line, nullptr, false);
  if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer()) return -1;
  return json["step"].get<int64_t>();
}

MetricsLog::MetricsLog(const std::filesystem::path& run, int64_t from_step, int64_t total_steps,
                       int64_t print_every, std::vector<std::string> loss_names, bool progress_bar)
    : from_step_(from_step),
      total_steps_(total_steps),
      print_every_(print_every),
      loss_names_(std::move(loss_names)),
      bar_(progress_bar),
      start_(Clock::now()),
      last_(start_),
      last_print_(start_) {
  const auto path = run / "metrics.jsonl";
  // By a file of its own: a run that ends here must not take along the lines of steps that are never made
  // again.
  data::write_whole(path, from_step > 0 ? kept_lines(path, from_step) : std::string());
  file_ = std::fopen(path.c_str(), "a");
  if (!file_)
    throw kernels::DataError(fmt::format("cannot write {}: check permissions and free space", path.string()));
}

MetricsLog::~MetricsLog() {
  if (bar_) std::fputs("\n", stdout);
  if (file_) std::fclose(file_);
}

void MetricsLog::step(const StepMetrics& m, int64_t tokens_so_far) {
  const auto now = Clock::now();
  const double elapsed = seconds(now - last_);
  last_ = now;
  tokens_since_print_ += m.tokens;
  nlohmann::ordered_json line = {{"step", m.step}, {"tokens", tokens_so_far}, {"loss", m.losses.front()}};
  for (size_t i = 1; i < m.losses.size(); ++i) line["losses"][loss_names_[i]] = m.losses[i];
  line["lr"] = m.learning_rate;
  line["grad_norm"] = m.gradient_norm;
  line["loss_scale"] = m.loss_scale;
  line["skipped"] = m.skipped;
  if (m.skipped) line["nonfinite"] = {{"tensor", m.nonfinite_tensor}, {"rank", m.nonfinite_rank}};
  line["tokens_per_second"] = m.tokens / elapsed;
  line["step_ms"] = elapsed * 1e3;
  std::fputs((line.dump() + "\n").c_str(), file_);
  if (m.skipped)
    note(fmt::format("step {}: overflow in {}, step skipped, loss scale {:g}", m.step,
                     m.nonfinite_tensor.empty() ? "the gradients" : m.nonfinite_tensor, m.loss_scale));
  const bool due = bar_ ? seconds(now - last_print_) > 0.2 : (m.step + 1) % print_every_ == 0;
  if (due || m.step == from_step_ || m.step + 1 == total_steps_) {
    print(m, tokens_since_print_ / seconds(now - last_print_));
    last_print_ = now;
    tokens_since_print_ = 0;
  }
}

void MetricsLog::print(const StepMetrics& m, double tokens_per_second) {
  const int64_t done = m.step + 1;
  const double rate = static_cast<double>(done - from_step_) / seconds(Clock::now() - start_);
  const std::string line = fmt::format(
      "step {}/{}  loss {:.3f}  lr {:.2e}  grad norm {:.2f}  loss scale {:g}  {:.1f}k tokens/s  {} left",
      done, total_steps_, m.losses.front(), m.learning_rate, m.gradient_norm, m.loss_scale,
      tokens_per_second / 1e3, duration(static_cast<double>(total_steps_ - done) / rate));
  if (!bar_) {
    fmt::print("{}\n", line);
    std::fflush(stdout);
    return;
  }
  constexpr int kBar = 20;
  const int filled = static_cast<int>(kBar * done / total_steps_);
  fmt::print("\r\033[K[{}{}] {}", std::string(filled, '#'), std::string(kBar - filled, '.'), line);
  std::fflush(stdout);
}

void MetricsLog::validation(int64_t step, const std::vector<double>& losses) {
  nlohmann::ordered_json line = {{"step", step}, {"validation_loss", losses.front()}};
  for (size_t i = 1; i < losses.size(); ++i) line["validation_losses"][loss_names_[i]] = losses[i];
  std::fputs((line.dump() + "\n").c_str(), file_);
  note(fmt::format("step {}: validation loss {:.3f}", step, losses.front()));
}

void MetricsLog::note(const std::string& text) {
  fmt::print("{}{}\n", bar_ ? "\r\033[K" : "", text);
  std::fflush(stdout);
}

void MetricsLog::flush() { std::fflush(file_); }

}  // namespace trainer

#include "launch/console.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace launch {

bool on_terminal() {
  const char* kind = std::getenv("TERM");
  if (isatty(STDOUT_FILENO) != 1 || kind == nullptr || std::string_view(kind) == "dumb") return false;
  // mpirun gives its ranks a terminal of its own making: what counts is where mpirun itself writes.
  if (std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr) return true;
  const int launcher = open(fmt::format("/proc/{}/fd/1", getppid()).c_str(), O_WRONLY | O_NOCTTY | O_CLOEXEC);
  if (launcher < 0) return false;
  const bool terminal = isatty(launcher) == 1;
  close(launcher);
  return terminal;
}

std::string bytes_text(double n) {
  if (n < 1e3) return fmt::format("{:.0f} B", n);
  for (const char* unit : {"kB", "MB", "GB"}) {
    n /= 1e3;
    if (n < 1e3) return fmt::format("{:.1f} {}", n, unit);
  }
  return fmt::format("{:.1f} TB", n / 1e3);
}

std::string count_text(int64_t n) {
  std::string digits = std::to_string(n);
  for (int at = static_cast<int>(digits.size()) - 3; at > (n < 0 ? 1 : 0); at -= 3) digits.insert(at, ",");
  return digits;
}

std::string time_text(double seconds) {
  if (seconds < 60) return fmt::format("{:.1f} s", seconds);
  const int64_t whole = static_cast<int64_t>(seconds + 0.5);
  if (whole < 3600) return fmt::format("{}:{:02}", whole / 60, whole % 60);
  return fmt::format("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60);
}

double Stopwatch::seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

Progress::~Progress() { end_line(); }

void Progress::end_line() {
  if (!open_) return;
  fmt::print("\n");
  open_ = false;
}

void Progress::show(const std::string& phase, double fraction) {
  const double part = std::clamp(fraction, 0.0, 1.0);
  const bool fresh = phase != phase_;
  const int quarter = static_cast<int>(part * 4);
  if (on_terminal()) {
    if (fresh) end_line();
    const double now = watch_.seconds();
    if (!fresh && part < 1 && now - drawn_at_ < 0.1) return;
    constexpr int kWidth = 30;
    const int filled = static_cast<int>(part * kWidth);
    fmt::print("\r{:<24} [{}{}] {:3.0f}%  {}", phase, std::string(filled, '#'),
               std::string(kWidth - filled, '.'), 100 * part, time_text(now));
    drawn_at_ = now;
    open_ = true;
  } else if (fresh || quarter != quarter_) {
    fmt::print("{} {:.0f}%  {}\n", phase, 100 * part, time_text(watch_.seconds()));
  }
  phase_ = phase;
  quarter_ = quarter;
  std::fflush(stdout);
}

}  // namespace launch

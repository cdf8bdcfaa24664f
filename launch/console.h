#pragma once
// What people see: progress, sizes, times. Plain lines where standard output is not a terminal.
#include <chrono>
#include <cstdint>
#include <string>

namespace launch {

// Whether standard output is a terminal that redraws lines. Under mpirun it always is a pseudo-terminal: the
// launch scripts set TERM=dumb where nobody sees it.
bool on_terminal();

std::string bytes_text(double n);       // "12.3 MB"
std::string count_text(int64_t n);      // "1,234,567"
std::string time_text(double seconds);  // "1:02:03", "2:03", "4.5 s"

class Stopwatch {
 public:
  double seconds() const;

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// A bar that is redrawn on a terminal; elsewhere a line for each phase and each quarter of it.
class Progress {
 public:
  ~Progress();
  void show(const std::string& phase, double fraction);

 private:
  void end_line();

  Stopwatch watch_;
  std::string phase_;
  int quarter_ = -1;
  double drawn_at_ = -1;
  bool open_ = false;
};

}  // namespace launch

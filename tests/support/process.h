#pragma once
// Another program, run to its end: for what only a whole process can show (exit codes, signals, kills).
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace support {

struct ProcessResult {
  int exit_code = -1;  // 128 + n when ended by signal n
  bool timed_out = false;
  std::string output;  // stdout and stderr
};

struct Process {
  std::vector<std::string> arguments;                            // the program is searched in PATH
  std::vector<std::pair<std::string, std::string>> environment;  // added to this process's own
  double timeout_seconds = 180;                                  // then it is killed
};

ProcessResult run(const Process& process);
// `arguments` under mpirun with this many ranks, as the launch scripts do it.
ProcessResult run_ranks(int ranks, std::vector<std::string> arguments, double timeout_seconds = 180);
Process ranks_process(int ranks, std::vector<std::string> arguments);

// The processes that `pid` started, with theirs, parents first.
std::vector<int> descendants(int pid);
// A variable of another process's environment, empty where it has none.
std::string environment_of(int pid, const std::string& name);

// A running program; killed and waited for when it goes out of scope.
class Running {
 public:
  explicit Running(const Process& process);
  ~Running();
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;
  int pid() const { return pid_; }
  ProcessResult wait();

 private:
  int pid_ = -1;
  double timeout_seconds_;
  std::filesystem::path output_;
};

}  // namespace support

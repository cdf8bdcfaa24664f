#include "tests/support/process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <map>
#include <stdexcept>
#include <thread>

namespace support {
namespace {

// In the child; only calls that are safe after a fork of a process with threads.
[[noreturn]] void become(const std::vector<char*>& arguments, const std::vector<char*>& environment,
                         int output) {
  ::dup2(output, STDOUT_FILENO);
  ::dup2(output, STDERR_FILENO);
  ::execvpe(arguments[0], arguments.data(), environment.data());
  ::_exit(127);
}

std::vector<std::string> environment_of(const Process& process) {
  std::vector<std::string> all;
  for (char** entry = environ; *entry; ++entry) {
    const std::string text = *entry;
    bool replaced = false;
    for (const auto& [name, value] : process.environment) replaced = replaced || text.starts_with(name + "=");
    if (!replaced) all.push_back(text);
  }
  for (const auto& [name, value] : process.environment) all.push_back(name + "=" + value);
  return all;
}

std::vector<char*> pointers(std::vector<std::string>& strings) {
  std::vector<char*> list;
  for (std::string& s : strings) list.push_back(s.data());
  list.push_back(nullptr);
  return list;
}

}  // namespace

std::vector<int> descendants(int pid) {
  // One look at all processes, then the tree below `pid`.
  std::multimap<int, int> children;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const int child = std::atoi(entry.path().filename().c_str());
    if (child <= 0) continue;
    std::ifstream in(entry.path() / "status");
    for (std::string word; in >> word;)
      if (int parent = 0; word == "PPid:" && in >> parent) children.emplace(parent, child);
  }
  std::vector<int> found = {pid};
  for (size_t i = 0; i < found.size(); ++i) {
    const auto [begin, end] = children.equal_range(found[i]);
    for (auto child = begin; child != end; ++child) found.push_back(child->second);
  }
  return {found.begin() + 1, found.end()};
}

std::string environment_of(int pid, const std::string& name) {
  std::ifstream in("/proc/" + std::to_string(pid) + "/environ", std::ios::binary);
  for (std::string entry; std::getline(in, entry, '\0');)
    if (entry.starts_with(name + "=")) return entry.substr(name.size() + 1);
  return "";
}

Running::Running(const Process& process) : timeout_seconds_(process.timeout_seconds) {
  std::string pattern = (std::filesystem::temp_directory_path() / "foretell_output_XXXXXX").string();
  const int output = ::mkstemp(pattern.data());
  if (output < 0) throw std::runtime_error("cannot create " + pattern);
  output_ = pattern;
  std::vector<std::string> arguments = process.arguments, environment = environment_of(process);
  const std::vector<char*> argv = pointers(arguments), envp = pointers(environment);
  pid_ = ::fork();
  if (pid_ == 0) become(argv, envp, output);
  ::close(output);
  if (pid_ < 0) throw std::runtime_error("cannot fork");
}

Running::~Running() {
  if (pid_ > 0) {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  std::error_code ignored;
  std::filesystem::remove(output_, ignored);
}

ProcessResult Running::wait() {
  ProcessResult result;
  int status = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_seconds_);
  while (::waitpid(pid_, &status, WNOHANG) == 0) {
    if (!result.timed_out && std::chrono::steady_clock::now() > end) {
      result.timed_out = true;
      ::kill(pid_, SIGKILL);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  pid_ = -1;
  result.exit_code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  std::ifstream in(output_, std::ios::binary);
  result.output.assign(std::istreambuf_iterator<char>(in), {});
  return result;
}

ProcessResult run(const Process& process) { return Running(process).wait(); }

Process ranks_process(int ranks, std::vector<std::string> arguments) {
  Process process;
  process.arguments = {"mpirun", "--bind-to", "none", "-np", std::to_string(ranks)};
  process.arguments.insert(process.arguments.end(), arguments.begin(), arguments.end());
  for (const char* name : {"OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM",
                           "OMPI_MCA_rmaps_base_oversubscribe", "OMPI_MCA_orte_execute_quiet"})
    process.environment.emplace_back(name, "1");
  return process;
}

ProcessResult run_ranks(int ranks, std::vector<std::string> arguments, double timeout_seconds) {
  Process process = ranks_process(ranks, std::move(arguments));
  process.timeout_seconds = timeout_seconds;
  return run(process);
}

}  // namespace support

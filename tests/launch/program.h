#pragma once
// Runs programs as a user does and keeps what they said.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "tests/support/process.h"
#include "tests/support/tiny_run.h"

namespace launch {

using support::TemporaryFolder;

// Writes a file and gives its path back, for a command line.
inline std::string write_text(const std::filesystem::path& file, const std::string& text) {
  std::filesystem::create_directories(file.parent_path());
  std::ofstream(file, std::ios::binary) << text;
  return file.string();
}

inline std::string read_text(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  std::stringstream text;
  text << stream.rdbuf();
  return text.str();
}

struct Outcome {
  int exit_code = -1;  // 128 + signal when killed
  std::string output, errors;
};

// What a shell says on standard output and standard error, apart.
inline Outcome run_shell(const std::string& command) {
  const TemporaryFolder folder;
  const std::string errors = (folder.path() / "errors").string();
  const support::ProcessResult result =
      support::run({{"bash", "-c", "{ " + command + "; } 2>" + errors + " </dev/null"}, {}});
  EXPECT_FALSE(result.timed_out) << command;
  return {result.exit_code, result.output, read_text(errors)};
}

// `arguments` as on a command line.
inline Outcome foretell(const std::string& arguments) { return run_shell(FORETELL_BINARY " " + arguments); }

// The same under mpirun, with the settings of the launch scripts.
inline Outcome foretell_ranks(int ranks, const std::string& arguments) {
  return run_shell("source " FORETELL_SOURCE "/launch/mpi_env.sh; mpirun -np " + std::to_string(ranks) +
                   " " FORETELL_BINARY " " + arguments);
}

// One line on standard error that begins with the program and holds `part`, and this exit code.
inline void expect_one_line(const Outcome& outcome, int exit_code, const std::string& part) {
  EXPECT_EQ(outcome.exit_code, exit_code) << outcome.errors;
  EXPECT_EQ(std::count(outcome.errors.begin(), outcome.errors.end(), '\n'), 1) << outcome.errors;
  EXPECT_EQ(outcome.errors.rfind("foretell: ", 0), 0u) << outcome.errors;
  EXPECT_NE(outcome.errors.find(part), std::string::npos)
      << "expected '" << part << "' in " << outcome.errors;
}

}  // namespace launch

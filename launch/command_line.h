#pragma once
// Flags and arguments of one subcommand.
#include <boost/program_options/options_description.hpp>
#include <boost/program_options/variables_map.hpp>
#include <optional>
#include <string>
#include <vector>

#include "launch/command.h"

namespace launch {

namespace po = boost::program_options;

// What `foretell COMMAND --help` says, and what the parser accepts.
struct CommandLine {
  std::string usage;                   // "train CONFIG [options]"
  std::string description;             // what it does, in a few lines
  std::string examples;                // indented lines
  std::vector<std::string> arguments;  // names of positional arguments, in order; all are required
  po::options_description flags{"Options"};

  // Empty when help was asked for and printed. ConfigError on wrong use: an unknown flag names the nearest
  // one.
  std::optional<po::variables_map> parse(const Arguments& given);
  // ConfigError with the reason and where the help is.
  [[noreturn]] void wrong_use(const std::string& reason) const;
};

// The value of a flag or argument that has a default or is required.
template <typename T>
T value(const po::variables_map& values, const char* name) {
  return values[name].as<T>();
}
// All values of a repeatable flag.
std::vector<std::string> list(const po::variables_map& values, const char* name);
// For a flag that may be given several times, with several values each.
po::typed_value<std::vector<std::string>>* repeatable();
po::typed_value<std::string>* text();

}  // namespace launch

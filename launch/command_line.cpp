#include "launch/command_line.h"

#include <fmt/format.h>

#include <boost/program_options/errors.hpp>
#include <boost/program_options/parsers.hpp>
#include <boost/program_options/positional_options.hpp>
#include <cstdio>
#include <sstream>

#include "configs/config.h"
#include "kernels/core/error.h"

namespace launch {
namespace {

// Whole names only: a flag that is added later must not change what a shorter one meant.
constexpr int kStyle = po::command_line_style::unix_style & ~po::command_line_style::allow_guessing;

void print_help(const CommandLine& line) {
  std::ostringstream flags;
  flags << line.flags;
  fmt::print("usage: foretell {}\n\n{}\n\n{}", line.usage, line.description, flags.str());
  if (!line.examples.empty()) fmt::print("\nExamples:\n{}\n", line.examples);
}

po::variables_map parse_strictly(const CommandLine& line, const Arguments& given) {
  po::options_description all;
  all.add(line.flags);
  po::options_description hidden;
  po::positional_options_description positions;
  for (const std::string& argument : line.arguments) {
    hidden.add_options()(argument.c_str(), po::value<std::string>());
    positions.add(argument.c_str(), 1);
  }
  all.add(hidden);
  po::variables_map values;
  po::store(po::command_line_parser(given).options(all).positional(positions).style(kStyle).run(), values);
  po::notify(values);
  return values;
}

void unknown_flag(const CommandLine& line, const std::string& name) {
  std::vector<std::string> known;
  for (const auto& flag : line.flags.options()) known.push_back("--" + flag->long_name());
  const std::string near = configs::nearest_name(name, known);
  line.wrong_use(near.empty() ? fmt::format("unknown option {}", name)
                              : fmt::format("unknown option {}; did you mean {}?", name, near));
}

}  // namespace

std::optional<po::variables_map> CommandLine::parse(const Arguments& given) {
  flags.add_options()("help,h", "show this help");
  try {
    po::variables_map values = parse_strictly(*this, given);
    if (values.count("help")) {
      print_help(*this);
      return std::nullopt;
    }
    for (const std::string& argument : arguments)
      if (!values.count(argument)) wrong_use(fmt::format("{} is missing", argument));
    return values;
  } catch (const po::unknown_option& error) {
    unknown_flag(*this, error.get_option_name());
  } catch (const po::too_many_positional_options_error&) {
    wrong_use("too many arguments");
  } catch (const po::error& error) {
    wrong_use(error.what());
  }
  return std::nullopt;
}

void CommandLine::wrong_use(const std::string& reason) const {
  throw kernels::ConfigError(
      fmt::format("{}; `foretell {} --help` shows the usage", reason, usage.substr(0, usage.find(' '))));
}

std::vector<std::string> list(const po::variables_map& values, const char* name) {
  return values.count(name) ? values[name].as<std::vector<std::string>>() : std::vector<std::string>{};
}

po::typed_value<std::vector<std::string>>* repeatable() {
  return po::value<std::vector<std::string>>()->composing();
}

po::typed_value<std::string>* text() { return po::value<std::string>(); }

}  // namespace launch

#include "configs/config.h"

#include <fmt/format.h>

#include "kernels/core/error.h"
#include "launch/command_line.h"

namespace launch {
namespace {

using configs::OptionText;

std::string section_of(const OptionText& option) { return option.name.substr(0, option.name.find('.')); }

void print_list() {
  std::string section;
  for (const OptionText& option : configs::option_texts()) {
    if (section_of(option) != section) {
      section = section_of(option);
      fmt::print("\n[{}]\n", section);
    }
    const std::string key = option.name.substr(section.size() + 1);
    fmt::print("{:<48} # {}\n", fmt::format("{} = {}", key, option.default_value), option.help);
  }
}

void print_option(const OptionText& option) {
  fmt::print("{}\n  {}\n  kind     {}\n  accepts  {}\n  default  {}\n", option.name, option.help, option.kind,
             option.accepts, option.default_value.empty() ? "(empty)" : option.default_value);
}

// A key, or all keys of a section.
void describe(const std::string& wanted) {
  std::vector<std::string> names;
  bool found = false;
  for (const OptionText& option : configs::option_texts()) {
    names.push_back(option.name);
    if (option.name != wanted && section_of(option) != wanted) continue;
    print_option(option);
    found = true;
  }
  if (found) return;
  const std::string near = configs::nearest_name(wanted, names);
  throw kernels::ConfigError(fmt::format(
      "unknown key '{}'; {}", wanted,
      near.empty() ? "`foretell config list` shows all keys" : fmt::format("did you mean '{}'?", near)));
}

}  // namespace

int config_command(const Arguments& arguments, Job& job) {
  CommandLine line;
  line.usage = "config list | config describe KEY";
  line.description =
      "list: every key of a configuration file with its default, in the form of a file.\n"
      "describe: what a key (or each key of a section) means and accepts.";
  line.examples =
      "  foretell config list\n"
      "  foretell config describe model.attention\n"
      "  foretell config describe optim";
  const bool describing = !arguments.empty() && arguments[0] == "describe";
  line.arguments = {"ACTION"};
  if (describing) line.arguments.push_back("KEY");
  const auto values = line.parse(arguments);
  if (!values) return 0;
  const std::string action = value<std::string>(*values, "ACTION");
  if (!describing && action != "list")
    line.wrong_use(fmt::format("unknown action '{}': write list or describe KEY", action));
  job.join_alone("config");
  if (describing)
    describe(value<std::string>(*values, "KEY"));
  else
    print_list();
  return 0;
}

}  // namespace launch

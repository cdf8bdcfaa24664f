#include "configs/options.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <type_traits>

#include "kernels/core/error.h"

namespace configs {
namespace {

using kernels::ConfigError;

template <typename T>
T parse_number(const std::string& text, const Range& range) {
  constexpr bool kWhole = std::is_integral_v<T>;
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc::invalid_argument || end != text.data() + text.size())
    throw ConfigError(fmt::format("'{}' is not a {}number", text, kWhole ? "whole " : ""));
  // Written so that NaN fails too.
  const bool inside = static_cast<double>(value) >= range.low && static_cast<double>(value) <= range.high;
  if (error == std::errc::result_out_of_range || !inside)
    throw ConfigError(fmt::format("must be between {} and {}, not {}", range.low, range.high, text));
  if (value != 0 && static_cast<float>(value) == 0)
    throw ConfigError(fmt::format(
        "{} is too small: fp32, which computes with it, takes it for 0; write 0 if that is meant", text));
  return value;
}

bool parse_bool(const std::string& text) {
  if (text == "true" || text == "yes" || text == "1") return true;
  if (text == "false" || text == "no" || text == "0") return false;
  throw ConfigError(fmt::format("must be true or false, not '{}'", text));
}

std::string parse_text(const std::string& text, const Choices& choices) {
  if (text.find('#') != std::string::npos)
    throw ConfigError(
        fmt::format("'{}' holds a '#', which starts a comment; choose a name without it", text));
  if (text.find_first_of("\r\n") != std::string::npos) throw ConfigError("must be a single line");
  if (choices.empty() || std::find(choices.begin(), choices.end(), text) != choices.end()) return text;
  throw ConfigError(fmt::format("must be one of {}, not '{}'", fmt::join(choices, ", "), text));
}

class Collector {
 public:
  Collector(std::vector<Option>& list, std::string section) : list_(list), section_(std::move(section)) {}

  template <typename T>
  void operator()(T& member, const char* key, Range range, const char* help) {
    add(
        key, std::is_integral_v<T> ? "whole number" : "number",
        fmt::format("{} to {}", range.low, range.high), help, [&member] { return fmt::format("{}", member); },
        [&member, range](const std::string& text) { member = parse_number<T>(text, range); });
  }
  void operator()(std::string& member, const char* key, Choices choices, const char* help) {
    std::string accepts = choices.empty() ? "any" : fmt::format("{}", fmt::join(choices, " | "));
    add(
        key, "text", std::move(accepts), help, [&member] { return member; },
        [&member, choices](const std::string& text) { member = parse_text(text, choices); });
  }
  void operator()(bool& member, const char* key, const char* help) {
    add(
        key, "true or false", "true | false", help, [&member] { return member ? "true" : "false"; },
        [&member](const std::string& text) { member = parse_bool(text); });
  }

 private:
  void add(const char* key, std::string kind, std::string accepts, const char* help,
           std::function<std::string()> get, std::function<void(const std::string&)> set) {
    list_.push_back(
        {section_, key, std::move(kind), std::move(accepts), help, std::move(get), std::move(set)});
  }

  std::vector<Option>& list_;
  std::string section_;
};

}  // namespace

std::vector<Option> list_options(Config& config) {
  std::vector<Option> list;
  config.sections([&](const char* name, auto& section) { section.options(Collector(list, name)); });
  return list;
}

std::vector<OptionText> option_texts() {
  Config defaults;
  std::vector<OptionText> texts;
  for (const Option& option : list_options(defaults))
    texts.push_back({option.name(), option.kind, option.get(), option.accepts, option.help});
  return texts;
}

double parse_temperature(const std::string& text) { return parse_number<double>(text, {0, 100}); }

std::string to_ini(const Config& config) {
  Config copy = config;
  std::string text, section;
  for (const Option& option : list_options(copy)) {
    if (option.section != section) {
      if (!section.empty()) text += "\n";
      section = option.section;
      text += fmt::format("[{}]\n", section);
    }
    const std::string value = option.get();
    text += value.empty() ? fmt::format("{} =\n", option.key) : fmt::format("{} = {}\n", option.key, value);
  }
  return text;
}

}  // namespace configs

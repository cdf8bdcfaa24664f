// Reading: a scan of the file first, which knows line numbers, then Boost's INI parser for the values.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <boost/program_options/options_description.hpp>
#include <boost/program_options/parsers.hpp>
#include <fstream>
#include <map>
#include <sstream>

#include "configs/config.h"
#include "configs/options.h"
#include "kernels/core/error.h"

namespace configs {
namespace {

using kernels::ConfigError;
namespace po = boost::program_options;

constexpr const char* kBlank = " \t\r";

std::string trim(std::string_view text) {
  const size_t begin = text.find_first_not_of(kBlank);
  if (begin == std::string_view::npos) return "";
  return std::string(text.substr(begin, text.find_last_not_of(kBlank) - begin + 1));
}

int edit_distance(std::string_view a, std::string_view b) {
  std::vector<int> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = static_cast<int>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    int diagonal = row[0];
    row[0] = static_cast<int>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const int substituted = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row[b.size()];
}

std::string did_you_mean(std::string_view word, const std::vector<std::string>& known,
                         const char* otherwise) {
  const std::string near = nearest_name(word, known);
  return near.empty() ? otherwise : fmt::format("did you mean '{}'?", near);
}

class Reader {
 public:
  Reader(Config& config, std::string name) : options_(list_options(config)), name_(std::move(name)) {
    for (const Option& option : options_) {
      names_.push_back(option.name());
      if (sections_.empty() || sections_.back() != option.section) sections_.push_back(option.section);
    }
  }

  void read(std::string_view text) {
    scan(text);
    po::options_description known;
    for (const std::string& name : names_) known.add_options()(name.c_str(), "");
    std::istringstream stream{std::string(text)};
    for (const auto& parsed : po::parse_config_file<char>(stream, known, true).options)
      set(parsed.string_key, parsed.value.at(0), at(lines_.at(parsed.string_key)));
  }

  void override_with(const std::string& text) {
    const size_t equals = text.find('=');
    if (equals == std::string::npos)
      throw ConfigError(fmt::format("--set {}: write it as section.key=value", text));
    const std::string name = trim(std::string_view(text).substr(0, equals));
    const std::string where = fmt::format("--set {}: ", text);
    check_known(name, where);
    set(name, trim(std::string_view(text).substr(equals + 1)), where);
  }

 private:
  std::string at(int line) const { return fmt::format("{}:{}: ", name_, line); }

  void check_known(const std::string& name, const std::string& where) const {
    if (std::find(names_.begin(), names_.end(), name) == names_.end())
      throw ConfigError(fmt::format("{}unknown key '{}'; {}", where, name,
                                    did_you_mean(name, names_, "`foretell config list` shows all keys")));
  }

  // Every line is checked here for what Boost would take silently or report without a line number.
  void scan(std::string_view text) {
    std::istringstream stream{std::string(text)};
    std::string raw, section;
    for (int number = 1; std::getline(stream, raw); ++number) {
      const std::string line = trim(without_comment(raw, number));
      if (line.empty()) continue;
      if (line.front() == '[') {
        section = section_of(line, number);
        continue;
      }
      const size_t equals = line.find('=');
      if (equals == std::string::npos)
        throw ConfigError(fmt::format("{}'{}' is neither '[section]' nor 'key = value'", at(number), line));
      const std::string key = trim(std::string_view(line).substr(0, equals));
      if (section.empty())
        throw ConfigError(fmt::format("{}'{}' stands before the first [section]", at(number), key));
      const std::string name = section + "." + key;
      check_known(name, at(number));
      if (const auto [it, fresh] = lines_.emplace(name, number); !fresh)
        throw ConfigError(fmt::format("{}{} was already set in line {}", at(number), name, it->second));
    }
  }

  std::string without_comment(const std::string& raw, int number) const {
    const size_t hash = raw.find('#');
    if (hash == std::string::npos) return raw;
    if (hash > 0 && std::string_view(kBlank).find(raw[hash - 1]) == std::string_view::npos)
      throw ConfigError(fmt::format(
          "{}a '#' inside a value starts a comment; put a space before it, or choose a name without it",
          at(number)));
    return raw.substr(0, hash);
  }

  std::string section_of(const std::string& line, int number) const {
    if (line.back() != ']') throw ConfigError(fmt::format("{}'{}' lacks its ']'", at(number), line));
    const std::string section = line.substr(1, line.size() - 2);
    if (std::find(sections_.begin(), sections_.end(), section) == sections_.end())
      throw ConfigError(fmt::format(
          "{}unknown section [{}]; {}", at(number), section,
          did_you_mean(section, sections_, fmt::format("known: {}", fmt::join(sections_, ", ")).c_str())));
    return section;
  }

  void set(const std::string& name, const std::string& value, const std::string& where) {
    const auto option =
        std::find_if(options_.begin(), options_.end(), [&](const Option& o) { return o.name() == name; });
    try {
      option->set(value);
    } catch (const ConfigError& error) {
      throw ConfigError(fmt::format("{}{} {}", where, name, error.what()));
    }
  }

  std::vector<Option> options_;
  std::vector<std::string> names_, sections_;
  std::string name_;
  std::map<std::string, int> lines_;
};

}  // namespace

std::string nearest_name(std::string_view word, const std::vector<std::string>& candidates) {
  std::string best;
  int best_distance = std::max<int>(2, static_cast<int>(word.size()) / 2) + 1;
  for (const std::string& candidate : candidates) {
    // The right key under the wrong section is nearer than its letters say.
    const size_t dot = candidate.find('.'), word_dot = word.find('.');
    const bool same_key = dot != std::string::npos && word_dot != std::string_view::npos &&
                          candidate.substr(dot) == word.substr(word_dot);
    const int distance = same_key ? 1 : edit_distance(word, candidate);
    if (distance < best_distance) best = candidate, best_distance = distance;
  }
  return best;
}

Config parse_config(std::string_view text, const std::string& name,
                    const std::vector<std::string>& overrides) {
  Config config;
  Reader reader(config, name);
  reader.read(text);
  for (const std::string& text_override : overrides) reader.override_with(text_override);
  try {
    validate(config);
  } catch (const ConfigError& error) {
    throw ConfigError(fmt::format("{}: {}", name, error.what()));
  }
  return config;
}

Config load_config(const std::filesystem::path& file, const std::vector<std::string>& overrides) {
  if (std::filesystem::is_directory(file))
    throw ConfigError(fmt::format("{} is a folder; name a configuration file (.cfg)", file.string()));
  std::ifstream stream(file, std::ios::binary);
  std::string text;
  for (char c; stream.get(c);) text += c;
  if (!stream.is_open() || stream.bad())
    throw ConfigError(
        fmt::format("cannot read the configuration file {}; configs/presets holds examples", file.string()));
  return parse_config(text, file.string(), overrides);
}

std::vector<std::string> split_list(std::string_view comma_separated) {
  std::vector<std::string> items;
  if (trim(comma_separated).empty()) return items;
  size_t begin = 0;
  while (true) {
    const size_t comma = comma_separated.find(',', begin);
    items.push_back(trim(comma_separated.substr(begin, comma - begin)));
    if (comma == std::string_view::npos) return items;
    begin = comma + 1;
  }
}

}  // namespace configs

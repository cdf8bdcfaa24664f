#pragma once
// The options of a Config as one flat list, made from its options() declarations.
#include <functional>
#include <string>
#include <vector>

#include "configs/config.h"

namespace configs {

struct Option {
  std::string section, key, kind, accepts, help;
  std::function<std::string()> get;
  // Parses and checks; throws ConfigError with the reason alone ("must be between 1 and 512, not 0").
  std::function<void(const std::string&)> set;
  std::string name() const { return section + "." + key; }
};

// Bound to `config`, which must outlive the list.
std::vector<Option> list_options(Config& config);

}  // namespace configs

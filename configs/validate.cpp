#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "configs/config.h"
#include "kernels/core/error.h"

namespace configs {
namespace {

using kernels::ConfigError;

template <typename... Args>
void require(bool holds, fmt::format_string<Args...> message, Args&&... args) {
  if (!holds) throw ConfigError(fmt::format(message, std::forward<Args>(args)...));
}

// Every item of a comma-separated value is one of `known`, and there is at least one.
void require_names(const std::string& key, const std::string& value, const std::vector<std::string>& known) {
  const std::vector<std::string> items = split_list(value);
  require(!items.empty(), "{} is empty; name at least one of {}", key, fmt::join(known, ", "));
  for (const std::string& item : items)
    require(std::find(known.begin(), known.end(), item) != known.end(), "{}: '{}' is not one of {}", key,
            item, fmt::join(known, ", "));
}

void validate_model(const ModelConfig& model) {
  require(model.width % model.heads == 0,
          "model.width = {} is not a multiple of model.heads = {}; change one of them", model.width,
          model.heads);
  require(model.heads % model.kv_heads == 0,
          "model.heads = {} is not a multiple of model.kv_heads = {}; change one of them", model.heads,
          model.kv_heads);
  require(
      model.position != "rope" || model.width / model.heads % 2 == 0,
      "model.position = rope turns pairs of channels, so that model.width / model.heads = {} must be even",
      model.width / model.heads);
  require_names("model.attention", model.attention, attention_kind_names());
}

void validate_training(const Config& config) {
  require(config.optim.warmup <= config.train.steps,
          "optim.warmup = {} is longer than train.steps = {}; the learning rate would never arrive",
          config.optim.warmup, config.train.steps);
  if (config.train.trainable != "heads") return;
  require(!config.train.init_from.empty(),
          "train.trainable = heads needs a trained trunk: set train.init_from to a run or a checkpoint");
  require(config.heads.medusa + config.heads.mtp > 0,
          "train.trainable = heads has nothing to train: set heads.medusa or heads.mtp above 0");
}

bool has_heads(const HeadsConfig& heads, const DrafterName& drafter) {
  if (drafter.heads.empty()) return true;
  return (drafter.heads == "medusa" ? heads.medusa : heads.mtp) > 0;
}

void validate_decoding(const Config& config) {
  const DecodeConfig& decode = config.decode;
  require_names("decode.acceptance", decode.acceptance, acceptance_names());
  const std::vector<std::string> temperatures = split_list(decode.temperature);
  require(!temperatures.empty(), "decode.temperature is empty; write for instance 0,1");
  for (const std::string& text : temperatures) {
    try {
      parse_temperature(text);
    } catch (const ConfigError& error) {
      throw ConfigError(fmt::format("decode.temperature: {}", error.what()));
    }
  }
  if (decode.drafters == "auto") return;
  std::vector<std::string> known;
  for (const DrafterName& drafter : drafter_names()) known.push_back(drafter.name);
  require_names("decode.drafters", decode.drafters, known);
  const std::vector<std::string> wanted = split_list(decode.drafters);
  for (const DrafterName& drafter : drafter_names())
    require(has_heads(config.heads, drafter) || std::count(wanted.begin(), wanted.end(), drafter.name) == 0,
            "decode.drafters names {}, which needs heads.{} above 0; or write decode.drafters = auto",
            drafter.name, drafter.heads);
}

}  // namespace

const std::vector<std::string>& attention_kind_names() {
  static const std::vector<std::string> names = {"softmax", "linear"};
  return names;
}

const std::vector<DrafterName>& drafter_names() {
  static const std::vector<DrafterName> names = {
      {"medusa", "medusa"}, {"medusa_tree", "medusa"}, {"mtp", "mtp"}, {"ngram", ""}};
  return names;
}

const std::vector<std::string>& acceptance_names() {
  static const std::vector<std::string> names = {"greedy", "rejection", "typical"};
  return names;
}

void validate(const Config& config) {
  validate_model(config.model);
  validate_training(config);
  validate_decoding(config);
  require(!config.log.run.empty(), "log.run is empty; name the folder of this run, for instance runs/first");
}

std::vector<std::string> attention_per_layer(const ModelConfig& model) {
  const std::vector<std::string> pattern = split_list(model.attention);
  require(!pattern.empty(), "model.attention is empty; name at least one of {}",
          fmt::join(attention_kind_names(), ", "));
  std::vector<std::string> kinds;
  for (int64_t layer = 0; layer < model.layers; ++layer)
    kinds.push_back(pattern[static_cast<size_t>(layer) % pattern.size()]);
  return kinds;
}

std::vector<std::string> drafters_to_evaluate(const Config& config) {
  if (config.decode.drafters != "auto") return split_list(config.decode.drafters);
  std::vector<std::string> names;
  for (const DrafterName& drafter : drafter_names())
    if (has_heads(config.heads, drafter)) names.push_back(drafter.name);
  return names;
}

}  // namespace configs

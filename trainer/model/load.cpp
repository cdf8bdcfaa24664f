#include "trainer/model/load.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

#include "checkpoints/checkpoint.h"
#include "checkpoints/safetensors.h"
#include "kernels/core/error.h"
#include "trainer/optim/settings.h"

namespace trainer {

namespace {

using kernels::CheckpointError;
using kernels::ConfigError;

constexpr std::string_view kMaster = "master/";

const std::string& text(const checkpoints::Reader& reader, const std::filesystem::path& checkpoint,
                        const std::string& key) {
  const auto it = reader.attributes().text.find(key);
  if (it == reader.attributes().text.end())
    throw CheckpointError(fmt::format("{} has no attribute '{}': it was not written by foretell train",
                                      checkpoint.string(), key));
  return it->second;
}

int64_t vocabulary_of(const checkpoints::Reader& reader, const std::filesystem::path& checkpoint) {
  const auto it = reader.attributes().integers.find("vocabulary");
  if (it == reader.attributes().integers.end() || it->second < 1)
    throw CheckpointError(fmt::format("{} does not say how large its vocabulary is", checkpoint.string()));
  return it->second;
}

using Keys = std::vector<std::pair<std::string, std::string>>;

// The keys that decide what a trunk computes, with their values; [model] first.
Keys architecture(configs::Config config) {
  const std::vector<std::string> kinds = configs::attention_per_layer(config.model);
  const bool linear = std::find(kinds.begin(), kinds.end(), "linear") != kinds.end();
  config.model.attention = fmt::format("{}", fmt::join(kinds, ","));
  if (config.model.position != "learned") config.model.context = 0;
  if (!linear) config.attention = {};
  Keys keys;
  const auto collect = [&](const std::string& section, auto& options) {
    options.options([&](const auto& value, const char* key, const auto&...) {
      keys.emplace_back(section + "." + key, fmt::format("{}", value));
    });
  };
  collect("model", config.model);
  collect("attention", config.attention);
  return keys;
}

// "medusa.0." or "mtp.1." of a head's parameter; empty for the trunk's.
std::string head_of(const std::string& name) {
  if (!name.starts_with("medusa.") && !name.starts_with("mtp.")) return {};
  return name.substr(0, name.find('.', name.find('.') + 1) + 1);
}

// Where weights come from: a checkpoint's masters, or a file of another program under the same names.
class Source {
 public:
  virtual ~Source() = default;
  virtual std::set<std::string> names() const = 0;
  virtual Shape shape(const std::string& name) const = 0;
  virtual std::vector<float> read(const std::string& name) const = 0;
};

class CheckpointSource final : public Source {
 public:
  CheckpointSource(const checkpoints::Reader& reader, const std::filesystem::path& path)
      : reader_(reader), path_(path) {}
  std::set<std::string> names() const override {
    std::set<std::string> names;
    for (const std::string& name : reader_.names())
      if (name.starts_with(kMaster)) names.insert(name.substr(kMaster.size()));
    return names;
  }
  Shape shape(const std::string& name) const override { return reader_.shape(std::string(kMaster) + name); }
  std::vector<float> read(const std::string& name) const override {
    const std::string stored = std::string(kMaster) + name;
    if (reader_.dtype(stored) != DType::f32)
      throw CheckpointError(fmt::format("{}: tensor '{}' is {}, expected fp32", path_.string(), name,
                                        name_of(reader_.dtype(stored))));
    const Shape shape = reader_.shape(stored);
    std::vector<float> values(static_cast<size_t>(shape.numel()));
    reader_.read(stored, Tensor(values.data(), DType::f32, shape));
    return values;
  }

 private:
  const checkpoints::Reader& reader_;
  const std::filesystem::path& path_;
};

class SafetensorsSource final : public Source {
 public:
  explicit SafetensorsSource(const std::filesystem::path& path) : reader_(path) {}
  std::set<std::string> names() const override {
    const std::vector<std::string> names = reader_.names();
    return {names.begin(), names.end()};
  }
  Shape shape(const std::string& name) const override { return reader_.shape(name); }
  std::vector<float> read(const std::string& name) const override { return reader_.read(name); }

 private:
  checkpoints::SafetensorsReader reader_;
};

bool holds_part_of(const std::set<std::string>& names, const std::string& head) {
  const auto it = names.lower_bound(head);
  return it != names.end() && it->starts_with(head);
}

// What a sequential Medusa head adds to one that is not: from 0 it changes nothing.
bool adds_tokens(const std::string& name) {
  return name.starts_with("medusa.") && name.find(".tokens.") != std::string::npos;
}

void take(const Source& source, const std::filesystem::path& path, const std::string& name,
          ParameterStore& store, int id) {
  const Parameter& p = store.parameters()[static_cast<size_t>(id)];
  if (source.shape(name) != p.shape)
    throw CheckpointError(fmt::format("{}: tensor '{}' is {}, expected {}", path.string(), name,
                                      to_string(source.shape(name)), to_string(p.shape)));
  std::vector<float> values = source.read(name);
  store.assign(id, Tensor(values.data(), DType::f32, p.shape));
}

void refuse_unknown(const std::filesystem::path& path, const std::set<std::string>& names,
                    const ParameterStore& store) {
  for (const std::string& name : names)
    if (store.find(name) < 0)
      throw CheckpointError(fmt::format(
          "{} holds tensor '{}', which this model has no place for: give [model] and [heads] of the "
          "configuration the values it was made with",
          path.string(), name));
}

// Every parameter from the source; names of whole heads' parameters that it lacks, or of what makes a Medusa
// head a sequential one, are returned when `fresh_heads`.
std::vector<std::string> take_all(const Source& source, const std::filesystem::path& path,
                                  ParameterStore& store, bool fresh_heads) {
  const std::set<std::string> names = source.names();
  refuse_unknown(path, names, store);
  std::vector<std::string> fresh;
  for (size_t i = 0; i < store.parameters().size(); ++i) {
    const Parameter& p = store.parameters()[i];
    if (names.contains(p.name)) {
      take(source, path, p.name, store, static_cast<int>(i));
      continue;
    }
    const std::string head = head_of(p.name);
    if (!fresh_heads || head.empty() || (holds_part_of(names, head) && !adds_tokens(p.name)))
      throw CheckpointError(fmt::format("{} lacks tensor '{}'", path.string(), p.name));
    // A fresh copy is one of the values just loaded, not of the model's first ones.
    if (p.init.kind == Init::Kind::copy)
      take(source, path, store.parameters()[static_cast<size_t>(p.init.source)].name, store,
           static_cast<int>(i));
    fresh.push_back(p.name);
  }
  return fresh;
}

}  // namespace

void check_architecture(const std::filesystem::path& checkpoint, const configs::Config& theirs,
                        const configs::Config& ours) {
  const Keys there = architecture(theirs), here = architecture(ours);
  for (size_t i = 0; i < there.size(); ++i)
    if (there[i] != here[i])
      throw CheckpointError(
          fmt::format("{} was trained with {} = {}, this configuration has {}: set it to {}",
                      checkpoint.string(), there[i].first, there[i].second, here[i].second, there[i].second));
}

void warn(const std::string& message) { fmt::print(stderr, "warning: {}\n", message); }

LoadedModel load_model(const Context& ctx, const std::filesystem::path& run_or_checkpoint,
                       const std::vector<std::string>& overrides) {
  return load_model_on([&](const configs::Config&) { return ctx; }, run_or_checkpoint, overrides);
}

LoadedModel load_model_on(const std::function<Context(const configs::Config&)>& place,
                          const std::filesystem::path& run_or_checkpoint,
                          const std::vector<std::string>& overrides) {
  for (const std::string& entry : overrides) {
    const std::string section = entry.substr(0, entry.find('.'));
    if (section != "decode" && section != "data" && section != "train" && section != "log")
      throw ConfigError(fmt::format(
          "--set {}: a trained checkpoint keeps its [{}]; only decode, data, train and log can be set here",
          entry, section));
  }
  LoadedModel loaded;
  loaded.checkpoint = checkpoints::resolve(run_or_checkpoint, warn);
  const checkpoints::Reader reader(loaded.checkpoint);
  loaded.step = reader.step();
  loaded.config = configs::parse_config(text(reader, loaded.checkpoint, "config"),
                                        loaded.checkpoint.string() + ": config", overrides);
  loaded.tokenizer = data::deserialize_tokenizer(text(reader, loaded.checkpoint, "tokenizer"));
  const int64_t vocabulary = vocabulary_of(reader, loaded.checkpoint);
  if (loaded.tokenizer->vocabulary() != vocabulary)
    throw CheckpointError(fmt::format("{}: its tokenizer has {} tokens and its model {}",
                                      loaded.checkpoint.string(), loaded.tokenizer->vocabulary(),
                                      vocabulary));
  const Context ctx = place(loaded.config);
  loaded.model = std::make_unique<Model>(loaded.config, vocabulary);
  loaded.model->parameters().allocate(ctx.device, compute_dtype(loaded.config), false);
  take_all(CheckpointSource(reader, loaded.checkpoint), loaded.checkpoint, loaded.model->parameters(), false);
  loaded.model->prepare_decoding(ctx);
  return loaded;
}

std::vector<std::string> load_weights(const std::filesystem::path& run_or_checkpoint, Model& model,
                                      const std::string& tokenizer_hash,
                                      const std::function<void(const std::string&)>& warn) {
  if (run_or_checkpoint.extension() == ".safetensors")
    return take_all(SafetensorsSource(run_or_checkpoint), run_or_checkpoint, model.parameters(), true);
  const std::filesystem::path checkpoint = checkpoints::resolve(run_or_checkpoint, warn);
  const checkpoints::Reader reader(checkpoint);
  const configs::Config theirs =
      configs::parse_config(text(reader, checkpoint, "config"), checkpoint.string() + ": config");
  check_architecture(checkpoint, theirs, model.config());
  const int64_t vocabulary = vocabulary_of(reader, checkpoint);
  if (vocabulary != model.vocabulary())
    throw CheckpointError(fmt::format(
        "{} has a vocabulary of {} tokens and the data {}: prepare the data with the checkpoint's tokenizer",
        checkpoint.string(), vocabulary, model.vocabulary()));
  if (!tokenizer_hash.empty() && text(reader, checkpoint, "tokenizer_hash") != tokenizer_hash)
    throw CheckpointError(fmt::format(
        "{} was trained with another tokenizer than the data: prepare the data with the checkpoint's",
        checkpoint.string()));
  return take_all(CheckpointSource(reader, checkpoint), checkpoint, model.parameters(), true);
}

}  // namespace trainer

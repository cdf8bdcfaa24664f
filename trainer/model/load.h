#pragma once
// A model back from a checkpoint, for evaluation and generation.
#include <filesystem>
#include <functional>
#include <memory>

#include "configs/config.h"
#include "data/tokenizer.h"
#include "trainer/model/model.h"

namespace trainer {

// "warning: " and the message, on stderr.
void warn(const std::string& message);

struct LoadedModel {
  std::filesystem::path checkpoint;
  int64_t step = 0;
  configs::Config config;  // as trained, with overrides applied to [decode], [data], [train] and [log]
  std::unique_ptr<data::Tokenizer> tokenizer;
  std::unique_ptr<Model> model;  // weights only, ready for decoding
};
// CheckpointError when it does not verify or does not fit its own configuration. Of a run the newest
// checkpoint that verifies; newer ones that do not are warned of.
LoadedModel load_model(const Context& ctx, const std::filesystem::path& run_or_checkpoint,
                       const std::vector<std::string>& overrides);
// The same on a device that is chosen once the configuration is known.
LoadedModel load_model_on(const std::function<Context(const configs::Config&)>& place,
                          const std::filesystem::path& run_or_checkpoint,
                          const std::vector<std::string>& overrides);
// CheckpointError that names the first key of [model] (or of [attention], where a layer is linear) in which
// what a trunk computes differs.
void check_architecture(const std::filesystem::path& checkpoint, const configs::Config& theirs,
                        const configs::Config& ours);
// Takes weights into a model that may hold heads the checkpoint lacks, or sequential Medusa heads where it
// has plain ones (what is new keeps its fresh values, and its names are returned); a tensor of another shape,
// or a trunk tensor that is missing, is a CheckpointError that names it. So is a checkpoint whose tokenizer
// has another hash than `tokenizer_hash` (empty: not compared). A .safetensors file, which knows no
// tokenizer, holds the parameters under their canonical names. `warn` is told of newer checkpoints of a run
// that do not verify.
std::vector<std::string> load_weights(const std::filesystem::path& run_or_checkpoint, Model& model,
                                      const std::string& tokenizer_hash = {},
                                      const std::function<void(const std::string&)>& warn = {});

}  // namespace trainer

#include "launch/samples.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>

#include "data/dataset.h"
#include "trainer/decode/evaluate.h"
#include "trainer/model/load.h"

namespace launch {
namespace {

std::string prompt_of(const configs::Config& config, const data::Tokenizer& tokenizer) {
  constexpr size_t kPromptTokens = 32;
  const data::TokenDataset validation(config.data.path, "validation", config.model.context);
  if (validation.documents() == 0) return "";
  std::vector<int32_t> tokens = validation.document(0);
  tokens.resize(std::min(tokens.size(), kPromptTokens));
  return tokenizer.decode(tokens);
}

}  // namespace

void append_sample(const configs::Config& config, const kernels::Context& ctx,
                   const std::filesystem::path& checkpoint) {
  try {
    trainer::LoadedModel loaded = trainer::load_model(ctx, checkpoint, {});
    trainer::GenerateOptions options;
    options.temperature = 0.7;
    options.prompt = prompt_of(config, *loaded.tokenizer);
    if (options.prompt.empty()) return;
    const trainer::Generated generated =
        trainer::generate(ctx, loaded, options, [](const std::string&, int64_t) {});
    std::ofstream stream(std::filesystem::path(config.log.run) / "samples.txt", std::ios::app);
    stream << fmt::format("==== step {}: a prompt\n{}\n==== and how the model goes on\n{}\n\n", loaded.step,
                          options.prompt, generated.text);
  } catch (const std::exception& error) {
    fmt::print(stderr, "warning: no text sample of {}: {}\n", checkpoint.string(), error.what());
  }
}

}  // namespace launch

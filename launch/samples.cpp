#include "launch/samples.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <utility>

#include "checkpoints/checkpoint.h"
#include "data/dataset.h"
#include "kernels/core/parallel.h"
#include "trainer/decode/evaluate.h"
#include "trainer/model/load.h"

namespace launch {
namespace {

namespace fs = std::filesystem;

struct GivenUp {};

std::string prompt_of(const configs::Config& config, const data::Tokenizer& tokenizer) {
  constexpr size_t kPromptTokens = 32;
  const data::TokenDataset validation(config.data.path, "validation", config.model.context);
  if (validation.documents() == 0) return "";
  std::vector<int32_t> tokens = validation.document(0);
  tokens.resize(std::min(tokens.size(), kPromptTokens));
  return tokenizer.decode(tokens);
}

void write_sample(const configs::Config& config, const fs::path& checkpoint, const std::stop_token& stop) {
  try {
    trainer::LoadedModel loaded = trainer::load_model({}, checkpoint, {});
    trainer::GenerateOptions options;
    options.temperature = 0.7;
    options.prompt = prompt_of(config, *loaded.tokenizer);
    if (options.prompt.empty()) return;
    const auto stop_in_time = [&](const std::string&, int64_t) {
      if (stop.stop_requested()) throw GivenUp();
    };
    const trainer::Generated generated = trainer::generate({}, loaded, options, stop_in_time);
    std::ofstream stream(fs::path(config.log.run) / "samples.txt", std::ios::app);
    stream << fmt::format("==== step {}: a prompt\n{}\n==== and how the model goes on\n{}\n\n", loaded.step,
                          options.prompt, generated.text);
  } catch (const GivenUp&) {
  } catch (const std::exception& error) {
    fmt::print(stderr, "warning: no text sample of {}: {}\n", checkpoint.string(), error.what());
  }
}

}  // namespace

Samples::Samples(const configs::Config& config, bool beside)
    : config_(config), beside_(beside && checkpoints::reads_beside_writes()) {
  if (beside_) thread_ = std::jthread([this](const std::stop_token& stop) { work(stop); });
}

Samples::~Samples() = default;

void Samples::append(const fs::path& checkpoint) {
  if (!beside_) return write_sample(config_, checkpoint, {});
  const std::lock_guard lock(mutex_);
  waiting_ = checkpoint;
  changed_.notify_all();
}

void Samples::finish() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return waiting_.empty() && !busy_; });
}

void Samples::work(const std::stop_token& stop) {
  const kernels::OnOneThread alone;
  std::unique_lock lock(mutex_);
  while (changed_.wait(lock, stop, [this] { return !waiting_.empty(); }) && !stop.stop_requested()) {
    const fs::path checkpoint = std::exchange(waiting_, {});
    busy_ = true;
    lock.unlock();
    write_sample(config_, checkpoint, stop);
    lock.lock();
    busy_ = false;
    changed_.notify_all();
  }
}

}  // namespace launch

#include "trainer/train/checkpointing.h"

#include <fmt/format.h>

#include <bit>
#include <cstdio>
#include <utility>

#include "kernels/core/error.h"

namespace trainer {

namespace {

using kernels::OptimizerState;
using kernels::Tensor;

void warn(const std::string& message) { fmt::print(stderr, "warning: {}\n", message); }

}  // namespace

Checkpointing::Checkpointing(const configs::Config& config, comm::Communicator& ranks, Model& model,
                             std::string tokenizer, std::string tokenizer_hash)
    : config_(config),
      ranks_(ranks),
      model_(model),
      tokenizer_(std::move(tokenizer)),
      tokenizer_hash_(std::move(tokenizer_hash)),
      directory_(std::filesystem::path(config.log.run) / "checkpoints") {
  if (ranks.rank() == 0)
    writer_ = std::make_unique<checkpoints::Writer>(directory_, static_cast<int>(config.checkpoint.shards));
}

std::filesystem::path Checkpointing::choose(const std::string& resume) const {
  // Rank 0 decides; what it found, or why it failed, is the same news to everyone.
  std::string answer;
  if (ranks_.rank() == 0) {
    try {
      if (resume == "none") {
        if (checkpoints::has_steps(directory_))
          throw kernels::ConfigError(fmt::format(
              "{} already holds checkpoints: add --resume auto to go on from them, or choose another log.run",
              directory_.string()));
      } else if (resume == "auto") {
        answer = "=" + checkpoints::find_newest(directory_, true, warn).string();
      } else {
        answer = "=" + checkpoints::resolve(resume).string();
      }
    } catch (const kernels::ConfigError& e) {
      answer = std::string("C") + e.what();
    } catch (const std::exception& e) {
      answer = std::string("E") + e.what();
    }
  }
  answer = ranks_.broadcast(answer, 0);
  if (answer.starts_with("C")) throw kernels::ConfigError(answer.substr(1));
  if (answer.starts_with("E")) throw kernels::CheckpointError(answer.substr(1));
  return answer.empty() ? std::filesystem::path() : std::filesystem::path(answer.substr(1));
}

// Every element of the training state under its canonical name: master/<parameter>, m/<parameter>,
// v/<parameter>.
std::vector<checkpoints::NamedTensor> Checkpointing::tensors() const {
  std::vector<checkpoints::NamedTensor> list;
  const auto& buffers = model_.parameters().buffers();
  const std::pair<const char*, Tensor> groups[] = {
      {"master", buffers.master}, {"m", buffers.m}, {"v", buffers.v}};
  for (const auto& [group, flat] : groups)
    for (const auto& p : model_.parameters().parameters()) {
      const Tensor part = flat.slice(p.begin, p.shape.numel());
      list.push_back({fmt::format("{}/{}", group, p.name), part.view(p.shape)});
    }
  list.push_back({"state/optimizer", buffers.state});
  return list;
}

Progress Checkpointing::restore(const std::filesystem::path& checkpoint) {
  const checkpoints::Reader reader(checkpoint);
  const auto& attributes = reader.attributes();
  const auto hash = attributes.text.find("tokenizer_hash");
  if (hash != attributes.text.end() && hash->second != tokenizer_hash_)
    throw kernels::CheckpointError(fmt::format(
        "{} was trained with another tokenizer than the data in {}: point data.path at the folder it was "
        "trained on",
        checkpoint.string(), config_.data.path));
  for (auto& [name, tensor] : tensors()) {
    if (!reader.contains(name) || reader.shape(name) != tensor.shape)
      throw kernels::CheckpointError(fmt::format(
          "{} does not fit this configuration: tensor {} is {} there and {} here; use the configuration it "
          "was trained "
          "with, or train.init_from to take over only what fits",
          checkpoint.string(), name, reader.contains(name) ? to_string(reader.shape(name)) : "missing",
          to_string(tensor.shape)));
    reader.read(name, tensor);
  }
  Progress progress;
  const auto integer = [&](const char* key, int64_t fallback) {
    const auto it = attributes.integers.find(key);
    return it == attributes.integers.end() ? fallback : it->second;
  };
  progress.tokens = integer("tokens", 0);
  progress.best_step = integer("best_step", -1);
  progress.best_validation_loss = std::bit_cast<double>(integer("best_validation_loss_bits", 0));
  if (ranks_.rank() == 0 && (integer("batch", config_.train.batch) != config_.train.batch ||
                             integer("seed", config_.train.seed) != config_.train.seed))
    warn("train.batch or train.seed differs from the checkpoint's: the data order changes from here on");
  return progress;
}

void Checkpointing::save(const Progress& progress) {
  if (!writer_) return;
  finish(progress, false);
  const auto& state = *static_cast<const OptimizerState*>(model_.parameters().buffers().state.data);
  checkpoints::Attributes attributes;
  attributes.text = {{"config", configs::to_ini(config_)},
                     {"tokenizer", tokenizer_},
                     {"tokenizer_hash", tokenizer_hash_},
                     {"version", kernels::kVersion}};
  attributes.integers = {
      {"step", state.step},
      {"updates", state.updates},
      {"tokens", progress.tokens},
      {"vocabulary", model_.vocabulary()},
      {"seed", config_.train.seed},
      {"batch", config_.train.batch},
      {"ranks", ranks_.size()},
      {"best_step", progress.best_step},
      {"best_validation_loss_bits", std::bit_cast<int64_t>(progress.best_validation_loss)}};
  try {
    writer_->start(state.step, attributes, tensors());
  } catch (const kernels::CheckpointError& e) {
    warn(fmt::format("no checkpoint at step {}: {}", state.step, e.what()));
    last_failure_ = e.what();
  }
}

std::filesystem::path Checkpointing::poll(const Progress& progress) {
  return writer_ && writer_->written() ? finish(progress, false) : std::filesystem::path();
}

std::filesystem::path Checkpointing::finish(const Progress& progress, bool must) {
  if (!writer_) return {};
  std::string reason = std::exchange(last_failure_, {});
  const bool in_flight = writer_->busy() || writer_->written();
  if (reason.empty() && in_flight && writer_->wait(reason)) {
    const auto path = writer_->commit();
    checkpoints::retain(directory_, config_.checkpoint.keep, config_.checkpoint.keep_every,
                        progress.best_step);
    return path;
  }
  if (reason.empty()) return {};
  if (in_flight) writer_->discard();
  const std::string message = fmt::format("the checkpoint could not be saved: {}", reason);
  if (must) throw kernels::CheckpointError(message + "; free space and run again with --resume auto");
  warn(message + "; training goes on, the last good checkpoint stays");
  return {};
}

}  // namespace trainer

#include "trainer/train/checkpointing.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <utility>

#include "kernels/core/error.h"
#include "trainer/model/load.h"

namespace trainer {

namespace {

using kernels::OptimizerState;
using kernels::Tensor;

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
        const std::filesystem::path chosen = checkpoints::resolve(resume, warn);
        // Of a run, or its folder, the newest that verifies was taken; a step was named to go back to it.
        if (chosen == resume) refuse_newer_steps(chosen);
        answer = "=" + chosen.string();
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

void Checkpointing::refuse_newer_steps(const std::filesystem::path& chosen) const {
  const int64_t newest = checkpoints::newest_step(directory_);
  if (newest < 0) return;
  const int64_t step = checkpoints::Reader(chosen).step();
  if (newest > step)
    throw kernels::ConfigError(fmt::format(
        "{} holds step {}, which is newer than {} and would be taken for this run's newest: move newer steps "
        "away, or choose another log.run",
        directory_.string(), newest, chosen.string()));
}

// Every element of the training state under its canonical name: master/<parameter>, m/<parameter>,
// v/<parameter>.
std::vector<Checkpointing::Item> Checkpointing::items() const {
  std::vector<Item> list;
  const auto& buffers = model_.parameters().buffers();
  const std::pair<const char*, Tensor> groups[] = {
      {"master", buffers.master}, {"m", buffers.m}, {"v", buffers.v}};
  const auto& parameters = model_.parameters().parameters();
  for (const auto& [group, flat] : groups)
    for (size_t i = 0; i < parameters.size(); ++i)
      list.push_back(
          {fmt::format("{}/{}", group, parameters[i].name), flat, static_cast<int>(i), parameters[i].shape});
  list.push_back({"state/optimizer", buffers.state, -1, buffers.state.shape});
  return list;
}

OptimizerState Checkpointing::state() const {
  const Tensor& there = model_.parameters().buffers().state;
  OptimizerState state;
  kernels::copy_bytes(&state, {}, there.data, there.device, sizeof(state));
  return state;
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
  const auto theirs = attributes.text.find("config");
  if (theirs != attributes.text.end())
    check_architecture(checkpoint, configs::parse_config(theirs->second, checkpoint.string() + ": config"),
                       config_);
  ParameterStore& store = model_.parameters();
  std::vector<char> staging;
  const std::vector<Item> list = items();
  for (const std::string& name : reader.names())
    if (std::none_of(list.begin(), list.end(), [&](const Item& item) { return item.name == name; }))
      throw kernels::CheckpointError(
          fmt::format("{} holds tensor {}, which this configuration does not have and would lose; use the "
                      "configuration it "
                      "was trained with, or train.init_from to take over only what fits",
                      checkpoint.string(), name));
  for (const Item& item : list) {
    if (!reader.contains(item.name) || reader.shape(item.name) != item.shape)
      throw kernels::CheckpointError(fmt::format(
          "{} does not fit this configuration: tensor {} is {} there and {} here; use the configuration it "
          "was trained "
          "with, or train.init_from to take over only what fits",
          checkpoint.string(), item.name,
          reader.contains(item.name) ? to_string(reader.shape(item.name)) : "missing",
          to_string(item.shape)));
    staging.resize(static_cast<size_t>(item.shape.numel()) * kernels::size_of(item.flat.dtype));
    const Tensor values(staging.data(), item.flat.dtype, item.shape);
    reader.read(item.name, values);
    if (item.parameter < 0)
      kernels::copy_bytes(item.flat.data, item.flat.device, values.data, {}, values.bytes());
    else if (item.flat.data == store.buffers().master.data)
      store.assign(item.parameter, values);
    else
      store.put(item.flat, item.parameter, values);
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

checkpoints::Attributes Checkpointing::attributes(const Progress& progress) const {
  const OptimizerState now = state();
  checkpoints::Attributes attributes;
  attributes.text = {{"config", configs::to_ini(config_)},
                     {"tokenizer", tokenizer_},
                     {"tokenizer_hash", tokenizer_hash_},
                     {"version", kernels::kVersion}};
  attributes.integers = {
      {"step", now.step},
      {"updates", now.updates},
      {"tokens", progress.tokens},
      {"vocabulary", model_.vocabulary()},
      {"seed", config_.train.seed},
      {"batch", config_.train.batch},
      {"ranks", ranks_.size()},
      {"best_step", progress.best_step},
      {"best_validation_loss_bits", std::bit_cast<int64_t>(progress.best_validation_loss)}};
  return attributes;
}

void Checkpointing::failed(const std::string& reason) {
  warn(fmt::format("no checkpoint at step {}: {}", state().step, reason));
  last_failure_ = reason;
}

// On rank 0: memory for the snapshot; false when there can be none now.
bool Checkpointing::prepare(const Progress& progress, std::vector<Tensor>& places) {
  finish(progress, false);
  std::vector<checkpoints::NamedTensor> wanted;
  for (const Item& item : items())
    wanted.push_back({item.name, Tensor(nullptr, item.flat.dtype, item.shape)});
  try {
    places = writer_->prepare(state().step, attributes(progress), wanted);
  } catch (const kernels::CheckpointError& e) {
    failed(e.what());
    return false;
  }
  return true;
}

// Brings one tensor together in `place` on rank 0, from whichever ranks hold it.
void Checkpointing::collect(const Item& item, const Tensor& place, std::vector<char>& staging) const {
  const ParameterStore& store = model_.parameters();
  const auto element = static_cast<int64_t>(kernels::size_of(item.flat.dtype));
  if (item.parameter < 0) {
    if (place) kernels::copy_bytes(place.data, {}, item.flat.data, item.flat.device, place.bytes());
    return;
  }
  const int64_t first = store.parameters()[static_cast<size_t>(item.parameter)].begin;
  for (int r = 0; r < store.sharding().ranks; ++r) {
    for (const auto& [begin, end, own] : store.held_by(r, item.parameter)) {
      if (!place) staging.resize(static_cast<size_t>((end - begin) * element));
      void* target = place ? static_cast<char*>(place.data) + (begin - first) * element : staging.data();
      const Tensor part(target, item.flat.dtype, {end - begin});
      if (r == store.sharding().rank)
        kernels::copy_bytes(target, {}, item.flat.slice(own, end - begin).data, item.flat.device,
                            part.bytes());
      if (r > 0) ranks_.transfer(part, r, 0);
    }
  }
}

void Checkpointing::save(const Progress& progress) {
  const bool sharded = model_.parameters().sharded();
  if (!writer_ && !sharded) return;
  std::vector<Tensor> places;
  bool possible = writer_ && prepare(progress, places);
  if (sharded) possible = ranks_.all_reduce(int64_t{possible}, comm::Reduce::max) != 0;
  if (!possible) return;
  const std::vector<Item> list = items();
  std::vector<char> staging;
  for (size_t i = 0; i < list.size(); ++i) collect(list[i], writer_ ? places[i] : Tensor(), staging);
  if (!writer_) return;
  try {
    writer_->begin();
    begun_ = true;
    last_failure_.clear();
  } catch (const kernels::CheckpointError& e) {
    failed(e.what());
  }
}

std::filesystem::path Checkpointing::poll(const Progress& progress) {
  return begun_ && !writer_->busy() ? finish(progress, false) : std::filesystem::path();
}

std::filesystem::path Checkpointing::finish(const Progress& progress, bool must) {
  if (!writer_) return {};
  std::filesystem::path saved;
  std::string reason = must ? last_failure_ : std::string();  // which was a warning already
  if (std::exchange(begun_, false)) {
    try {
      if (writer_->wait(reason))
        saved = writer_->commit();
      else
        writer_->discard();
    } catch (const kernels::CheckpointError& e) {
      reason = e.what();
    }
  }
  if (!saved.empty()) remove_old(progress);
  if (reason.empty()) return saved;
  const std::string message = fmt::format("the checkpoint could not be saved: {}", reason);
  if (must) throw kernels::CheckpointError(message + "; free space and run again with --resume auto");
  warn(message + "; training goes on, the last good checkpoint stays");
  return {};
}

void Checkpointing::remove_old(const Progress& progress) const {
  try {
    checkpoints::retain(directory_, config_.checkpoint.keep, config_.checkpoint.keep_every,
                        progress.best_step);
  } catch (const kernels::CheckpointError& e) {
    warn(fmt::format("old checkpoints could not be removed: {}", e.what()));
  }
}

}  // namespace trainer

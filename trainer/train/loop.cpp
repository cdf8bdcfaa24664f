#include "trainer/train/loop.h"

#include <fmt/format.h>

#include <cmath>
#include <exception>
#include <fstream>
#include <optional>

#include "checkpoints/files.h"
#include "data/batch_loader.h"
#include "data/dataset.h"
#include "kernels/core/error.h"
#include "trainer/model/load.h"
#include "trainer/optim/settings.h"
#include "trainer/train/checkpointing.h"
#include "trainer/train/metrics.h"
#include "trainer/train/step.h"

namespace trainer {

namespace {

namespace fs = std::filesystem;

data::LoaderParams loader_params(const configs::Config& config, int64_t offsets) {
  return {static_cast<uint64_t>(config.train.seed), config.train.batch, config.train.micro_batch,
          config.model.context, offsets};
}

void check_sizes(const configs::Config& config, const data::TokenDataset& dataset,
                 const comm::Communicator& ranks) {
  if (dataset.samples() < ranks.size())
    throw kernels::ConfigError(
        fmt::format("{} ranks but only {} training samples in {}: start fewer ranks or prepare more text",
                    ranks.size(), dataset.samples(), config.data.path));
  const int64_t micro_batches =
      (config.train.batch + config.train.micro_batch - 1) / config.train.micro_batch;
  if (ranks.rank() == 0 && micro_batches < ranks.size())
    fmt::print(stderr,
               "warning: train.batch {} in micro-batches of {} keeps only {} of {} ranks busy: lower "
               "train.micro_batch\n",
               config.train.batch, config.train.micro_batch, micro_batches, ranks.size());
}

// One job of one rank, with everything it holds.
class Job {
 public:
  Job(const configs::Config& config, comm::Communicator& ranks, const kernels::Context& ctx,
      const TrainOptions& options)
      : config_(config),
        ranks_(ranks),
        ctx_(ctx),
        options_(options),
        dataset_(config.data.path, "train", config.model.context),
        validation_(config.data.path, "validation", config.model.context),
        tokenizer_(data::load_tokenizer(config.data.path)),
        model_(config, tokenizer_->vocabulary()),
        loader_(dataset_, loader_params(config, model_.offsets())),
        checkpointing_(config_, ranks, model_, tokenizer_->serialized(), tokenizer_->hash()) {
    check_sizes(config, dataset_, ranks);
    if (validation_.samples() > 0)
      validation_loader_.emplace(validation_, loader_params(config, model_.offsets()));
  }

  // Memory, and the weights to begin with.
  void start() {
    from_ = checkpointing_.choose(options_.resume);
    model_.parameters().allocate(
        ctx_.device, compute_dtype(config_), true, false,
        config_.comm.zero > 0 ? kernels::Shard{ranks_.rank(), ranks_.size()} : kernels::Shard{});
    model_.parameters().initialize(ctx_, static_cast<uint64_t>(config_.train.seed));
    if (from_.empty() && !config_.train.init_from.empty()) take_initial_weights();
    stepper_ = std::make_unique<Stepper>(config_, model_, loader_, ranks_, ctx_);
    if (!from_.empty()) {
      progress_ = checkpointing_.restore(from_);
      stepper_->read_state();
    }
  }

  TrainResult run() {
    if (ranks_.rank() == 0) open_run();
    const bool asked = steps();
    const fs::path last = checkpointing_.finish(progress_, true);
    committed(last);
    ranks_.barrier();
    return {asked ? StopReason::asked_to_stop : StopReason::finished, stepper_->attempts(),
            !last.empty()   ? last
            : from_.empty() ? fs::path(config_.log.run) / "checkpoints"
                            : from_};
  }

 private:
  void take_initial_weights() {
    const auto fresh = load_weights(config_.train.init_from, model_, tokenizer_->hash(),
                                    ranks_.rank() == 0 ? warn : nullptr);
    if (ranks_.rank() == 0)
      fmt::print("weights from {}{}\n", config_.train.init_from,
                 fresh.empty() ? ""
                               : fmt::format("; {} tensors that it lacks start fresh ({}{})", fresh.size(),
                                             fresh.front(), fresh.size() > 1 ? ", ..." : ""));
  }

  void open_run() {
    checkpoints::create_synced(config_.log.run);
    std::ofstream(fs::path(config_.log.run) / "config.resolved.cfg") << configs::to_ini(config_);
    std::vector<std::string> names;
    for (const auto& loss : model_.losses()) names.push_back(loss.name);
    log_ = std::make_unique<MetricsLog>(config_.log.run, stepper_->attempts(), config_.train.steps,
                                        config_.log.every, names, options_.progress_bar);
    log_->note(fmt::format("{:.2f}M parameters, {} training tokens, {} samples a step on {} rank{} ({})",
                           static_cast<double>(model_.parameters().elements()) / 1e6, dataset_.tokens(),
                           config_.train.batch, ranks_.size(), ranks_.size() == 1 ? "" : "s",
                           kernels::describe(ctx_.device)));
    if (!validation_loader_ && config_.train.validate_every > 0)
      log_->note("nothing is validated: the data holds no text for it (foretell prepare --val-fraction)");
    if (!from_.empty())
      log_->note(fmt::format("going on from {} at step {}", from_.string(), stepper_->attempts()));
  }

  // True when the job was asked to stop.
  bool steps() {
    int64_t saved_at = stepper_->attempts();
    bool asked = false;
    while (stepper_->attempts() < config_.train.steps && !asked) {
      asked = report(stepper_->run(options_.stop_requested()));
      const int64_t done = stepper_->attempts();
      const bool last = done == config_.train.steps;
      const bool due = config_.checkpoint.every > 0 && done % config_.checkpoint.every == 0;
      const bool validating = validation_loader_ && config_.train.validate_every > 0 &&
                              (done % config_.train.validate_every == 0 || last);
      if (last || due || validating || asked) asked |= flush();
      const bool saving = (due || last || asked) && done != saved_at;
      if (validating) validate(done, saving);
      committed(checkpointing_.poll(progress_));
      if (saving) {
        committed(checkpointing_.finish(progress_, false));
        if (log_) log_->flush();
        checkpointing_.save(progress_);
        saved_at = done;
      }
    }
    return asked;
  }

  // Waits for the steps under way. True when one of them was asked to stop.
  bool flush() {
    bool asked = false;
    while (const auto metrics = stepper_->flush()) asked |= report(metrics);
    return asked;
  }

  // What a finished step says; nothing while the first one is under way. True when it was asked to stop.
  bool report(const std::optional<StepMetrics>& metrics) {
    if (!metrics) return false;
    progress_.tokens += static_cast<int64_t>(metrics->tokens);
    if (log_) log_->step(*metrics, progress_.tokens);
    check_skips(*metrics);
    return metrics->stop_requested;
  }

  void check_skips(const StepMetrics& metrics) const {
    if (metrics.consecutive_skips < config_.precision.max_consecutive_skips) return;
    throw kernels::Error(
        fmt::format("{} steps in a row overflowed (loss scale {:g}); the first non-finite gradient is in "
                    "{}{}: lower optim.lr, or use "
                    "precision.compute=bf16 or fp32",
                    metrics.consecutive_skips, metrics.loss_scale, metrics.nonfinite_tensor,
                    metrics.nonfinite_rank < 0 ? "" : fmt::format(" on rank {}", metrics.nonfinite_rank)));
  }

  // saved: whether there will be a checkpoint of this step, which may be the best.
  void validate(int64_t done, bool saved) {
    const auto batches = validation_loader_->some_micro_batches(config_.train.validate_batches);
    const auto losses = stepper_->validate(*validation_loader_, batches);
    if (log_) log_->validation(done, losses);
    if (!saved || !std::isfinite(losses.front())) return;
    if (progress_.best_step < 0 || losses.front() < progress_.best_validation_loss) {
      progress_.best_step = done;
      progress_.best_validation_loss = losses.front();
    }
  }

  void committed(const fs::path& checkpoint) {
    if (checkpoint.empty()) return;
    if (log_) log_->note(fmt::format("saved {}", checkpoint.string()));
    if (ranks_.rank() == 0) options_.on_checkpoint(checkpoint);
  }

  const configs::Config config_;
  comm::Communicator& ranks_;
  kernels::Context ctx_;
  const TrainOptions& options_;
  data::TokenDataset dataset_, validation_;
  std::unique_ptr<data::Tokenizer> tokenizer_;
  Model model_;
  data::BatchLoader loader_;
  std::optional<data::BatchLoader> validation_loader_;  // where there is text to validate on
  Checkpointing checkpointing_;
  Progress progress_;
  std::filesystem::path from_;  // the checkpoint this job goes on from
  std::unique_ptr<Stepper> stepper_;
  std::unique_ptr<MetricsLog> log_;
};

// Before anything is loaded.
void refuse_what_does_not_fit(const configs::Config& config, int ranks, const kernels::Context& ctx) {
  const int64_t vocabulary = data::read_dataset_info(config.data.path).vocabulary;
  const std::string problem = plan_memory(config, vocabulary, ranks, ctx).problem;
  if (!problem.empty()) throw kernels::ConfigError(problem);
}

// Runs a part of the set-up on every rank. What is wrong with the input is wrong for all of them: the lowest
// rank that found it says so, and ends the others, which wait for that here.
void together(comm::Communicator& ranks, const std::function<void()>& part) {
  std::exception_ptr problem;
  try {
    part();
  } catch (...) {
    problem = std::current_exception();
  }
  const int64_t size = ranks.size(), rank = ranks.rank();
  const int64_t first = size - ranks.all_reduce(problem ? size - rank : int64_t{0}, comm::Reduce::max);
  if (first == rank) std::rethrow_exception(problem);
  if (first < size) ranks.barrier();
}

}  // namespace

TrainResult train(const configs::Config& config, comm::Communicator& ranks, const kernels::Context& ctx,
                  const TrainOptions& options) {
  std::unique_ptr<Job> job;
  if (ctx.device.is_cuda()) together(ranks, [&] { refuse_what_does_not_fit(config, ranks.size(), ctx); });
  together(ranks, [&] { job = std::make_unique<Job>(config, ranks, ctx, options); });
  together(ranks, [&] { job->start(); });
  return job->run();
}

}  // namespace trainer

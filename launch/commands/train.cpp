#include <fmt/format.h>

#include <cstdio>

#include "kernels/core/error.h"
#include "launch/command_line.h"
#include "launch/console.h"
#include "launch/plan_table.h"
#include "launch/run_directory.h"
#include "launch/samples.h"
#include "launch/signals.h"
#include "trainer/train/loop.h"

namespace launch {
namespace {

namespace fs = std::filesystem;

CommandLine command_line() {
  CommandLine line;
  line.usage = "train CONFIG [options]";
  line.description =
      "Trains the model that CONFIG describes on prepared data, or fine-tunes a checkpoint "
      "(train.init_from). Under\n"
      "mpirun the ranks share every step. Writes into log.run: configuration, metrics, checkpoints, samples "
      "of text.\n"
      "SIGUSR1 and SIGTERM save and stop (exit code 75); --resume auto goes on from there.";
  line.examples =
      "  foretell train configs/presets/quickstart.cfg --set data.path=prepared/mine --set "
      "log.run=runs/mine\n"
      "  mpirun --bind-to none -np 2 foretell train my.cfg --resume auto\n"
      "  foretell train configs/presets/medusa1.cfg --set train.init_from=runs/mine";
  line.arguments = {"CONFIG"};
  line.flags.add_options()                                                              //
      ("set", repeatable(), "section.key=value, replaces a key of CONFIG; repeatable")  //
      ("resume", text()->default_value("none"),
       "none: a new run; auto: from the newest checkpoint of log.run, if there is one; or a checkpoint's "
       "path")  //
      ("dry-run", "print memory and time as `foretell plan` does, and stop");
  return line;
}

configs::Config read_config(const po::variables_map& values) {
  configs::Config config = configs::load_config(value<std::string>(values, "CONFIG"), list(values, "set"));
  if (config.data.path.empty() && !values.count("dry-run"))
    throw kernels::ConfigError(
        "data.path is not set; run `foretell prepare` and give its folder with --set data.path=DIR");
  return config;
}

// The state of the run as other programs see it.
class StatusKeeper {
 public:
  StatusKeeper(fs::path run, bool writes) : run_(std::move(run)), writes_(writes) {}

  // The loop asks whether to stop once a step: with the first question the run directory is there and ours.
  bool stop_requested() {
    if (!begun_ && writes_) write_status(run_, {"running", last_logged_step(run_), 0, ""});
    begun_ = true;
    return launch::stop_requested();
  }
  void ended(const trainer::TrainResult& result) {
    if (!writes_) return;
    const bool finished = result.reason == trainer::StopReason::finished;
    write_status(run_, finished ? RunStatus{"finished", result.step, 0, ""}
                                : RunStatus{"stopped", result.step, kExitStopped, "asked to stop, saved"});
  }
  // By the rank that failed, whichever it is.
  void failed(const std::exception_ptr& problem) {
    if (begun_)
      write_status(run_, {"failed", last_logged_step(run_), exit_code_of(problem), one_line(problem)});
  }

 private:
  fs::path run_;
  bool writes_, begun_ = false;
};

trainer::TrainResult train(const configs::Config& config, comm::Communicator& world,
                           const kernels::Context& ctx, const std::string& resume) {
  StatusKeeper status(config.log.run, world.rank() == 0);
  trainer::TrainOptions options;
  options.progress_bar = on_terminal();
  options.resume = resume;
  options.stop_requested = [&] { return status.stop_requested(); };
  Samples samples(config, world.rank() == 0 && ctx.device.is_cuda());
  options.on_checkpoint = [&](const fs::path& checkpoint) { samples.append(checkpoint); };
  try {
    const trainer::TrainResult result = trainer::train(config, world, ctx, options);
    status.ended(result);
    if (result.reason == trainer::StopReason::finished) samples.finish();
    return result;
  } catch (...) {
    status.failed(std::current_exception());
    throw;
  }
}

// What evaluate and generate are given: the run, or the checkpoint of another one that had nothing left to
// do.
std::string model_of(const configs::Config& config, const trainer::TrainResult& result) {
  const fs::path folder = result.checkpoint.parent_path();
  return folder == fs::path(config.log.run) / "checkpoints" ? config.log.run : result.checkpoint.string();
}

void print_end(const configs::Config& config, const trainer::TrainResult& result, double seconds) {
  if (result.reason == trainer::StopReason::asked_to_stop)
    fmt::print("stopped at step {} and saved {}; go on with --resume auto\n", result.step,
               result.checkpoint.string());
  else
    fmt::print(
        "finished {0} steps in {1}; the model is in {2}\nnext: foretell evaluate {3}\n      foretell "
        "generate {3} "
        "--prompt TEXT\n",
        result.step, time_text(seconds), result.checkpoint.string(), model_of(config, result));
}

}  // namespace

int train_command(const Arguments& arguments, Job& job) {
  CommandLine line = command_line();
  const auto values = line.parse(arguments);
  if (!values) return 0;
  configs::Config config;
  std::exception_ptr problem;
  try {
    config = read_config(*values);
  } catch (...) {
    problem = std::current_exception();
  }
  comm::Session& session = job.join(std::chrono::seconds(config.comm.deadline_seconds), problem);
  comm::Communicator& world = session.world();
  const bool speaks = world.rank() == 0;
  const Placement placement = place(session, speaks, config.train.device, config.train.threads);
  if (values->count("dry-run")) {
    if (speaks) print_plan(config, 0, world.size(), placement.ctx);
    world.barrier();
    return 0;
  }
  watch_stop_signals();
  Stopwatch watch;
  const auto gpus = comm::make_gpu_communicator(world, placement.ctx.device, placement.ctx.stream,
                                                std::chrono::seconds(config.comm.deadline_seconds));
  const trainer::TrainResult result =
      train(config, gpus ? *gpus : world, placement.ctx, value<std::string>(*values, "resume"));
  if (speaks) print_end(config, result, watch.seconds());
  return result.reason == trainer::StopReason::finished ? 0 : kExitStopped;
}

}  // namespace launch

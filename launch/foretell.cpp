// The command line: finds the subcommand, reports errors in one line, ends the whole job with one exit code.
#include <fmt/format.h>
#include <malloc.h>

#include <cstdio>

#include "configs/config.h"
#include "kernels/core/build_config.h"
#include "kernels/core/error.h"
#include "launch/command.h"

namespace launch {
namespace {

struct Command {
  const char* name;
  const char* summary;
  int (*run)(const Arguments&, Job&);
};

constexpr Command kCommands[] = {
    {"prepare", "turn files of text into token shards to train on", prepare_command},
    {"train", "train or fine-tune a model; under mpirun over several ranks", train_command},
    {"evaluate", "measure perplexity and speculative decoding; writes report.html", evaluate_command},
    {"generate", "continue a text", generate_command},
    {"inspect", "say what a run, a checkpoint or prepared data holds, and whether it is whole",
     inspect_command},
    {"plan", "memory and time of a training run, before anything runs", plan_command},
    {"config", "list and explain the keys of configuration files", config_command},
};

void print_usage() {
  fmt::print(
      "Foretell trains transformers that look several tokens ahead, and measures how much faster that lets "
      "them "
      "decode.\n\nusage: foretell COMMAND [arguments]\n\n");
  for (const Command& command : kCommands) fmt::print("  {:<9} {}\n", command.name, command.summary);
  fmt::print(
      "\n`foretell COMMAND --help` explains one command. A first run:\n\n"
      "  foretell prepare --input my_texts --output prepared/mine\n"
      "  foretell train configs/presets/quickstart.cfg --set data.path=prepared/mine --set "
      "log.run=runs/mine\n"
      "  foretell evaluate runs/mine\n"
      "  foretell generate runs/mine --prompt \"Once\"\n");
}

int dispatch(const Arguments& arguments, Job& job) {
  if (arguments.empty() || arguments[0] == "--help" || arguments[0] == "-h" || arguments[0] == "help") {
    print_usage();
    return arguments.empty() ? 2 : 0;
  }
  if (arguments[0] == "--version") {
    fmt::print("foretell {}{}\n", kernels::kVersion, kernels::kCudaEnabled ? " (with CUDA)" : " (CPU only)");
    return 0;
  }
  std::vector<std::string> names;
  for (const Command& command : kCommands) {
    if (arguments[0] == command.name) return command.run({arguments.begin() + 1, arguments.end()}, job);
    names.push_back(command.name);
  }
  const std::string near = configs::nearest_name(arguments[0], names);
  throw kernels::ConfigError(
      fmt::format("unknown command '{}'; {}", arguments[0],
                  near.empty() ? "`foretell --help` lists them" : fmt::format("did you mean '{}'?", near)));
}

int run(const Arguments& arguments, Job& job) {
  std::exception_ptr problem;
  try {
    return dispatch(arguments, job);
  } catch (const Refused& refused) {
    return refused.exit_code;
  } catch (...) {
    problem = std::current_exception();
  }
  if (job.joined()) return job.fail(problem);
  // Before the ranks have met: most likely they all found the same, and only one shall say so.
  try {
    job.join(std::chrono::minutes(1), problem);
  } catch (const Refused& refused) {
    return refused.exit_code;
  } catch (...) {
    return job.fail(problem);
  }
  return exit_code_of(problem);
}

}  // namespace
}  // namespace launch

int main(int argc, char** argv) {
  // What is freed stays here: a checkpoint goes through thousands of blocks of a MiB, and those that the
  // system gave anew each time would have to be cleared.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 128 << 20);
  launch::Job job(&argc, &argv);
  return launch::run({argv + 1, argv + argc}, job);
}

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "kernels/core/cores.h"
#include "kernels/core/parallel.h"
#include "launch/command_line.h"
#include "launch/plan_table.h"

namespace launch {

int plan_command(const Arguments& arguments, Job& job) {
  CommandLine line;
  line.usage = "plan CONFIG [--ranks N] [options]";
  line.description =
      "Prints the memory that each rank needs, by rehearsing one step, and an estimate of the time, which "
      "comes from\n"
      "a short measurement on this machine. Nothing is trained or written.";
  line.examples =
      "  foretell plan configs/presets/quickstart.cfg --ranks 2\n"
      "  foretell plan my.cfg --set model.width=1024 --set train.micro_batch=4";
  line.arguments = {"CONFIG"};
  line.flags.add_options()                                                    //
      ("ranks", po::value<int>()->default_value(1), "ranks that will train")  //
      ("vocabulary", po::value<int64_t>()->default_value(0),
       "tokens of the tokenizer; 0 takes them from data.path")  //
      ("set", repeatable(), "section.key=value, replaces a key of CONFIG");
  const auto values = line.parse(arguments);
  if (!values) return 0;
  const int ranks = value<int>(*values, "ranks");
  const int64_t vocabulary = value<int64_t>(*values, "vocabulary");
  if (ranks < 1 || ranks > 1 << 20) line.wrong_use(fmt::format("--ranks {} is not a number of ranks", ranks));
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // a token is 32 bits
  if (vocabulary < 0 || vocabulary == 1 || vocabulary > kMost)
    line.wrong_use(fmt::format("--vocabulary must be between 2 and {}", kMost));
  const configs::Config config =
      configs::load_config(value<std::string>(*values, "CONFIG"), list(*values, "set"));
  comm::Session& session = job.join_alone("plan");
  const int64_t shared = std::max(1, kernels::available_cores() / ranks);
  const Placement placement =
      place(session, false, config.train.device, config.train.threads > 0 ? config.train.threads : shared);
  print_plan(config, vocabulary, ranks, placement.ctx);
  return 0;
}

}  // namespace launch

#include "trainer/decode/evaluate.h"

#include <fmt/format.h>

#include <cstdio>

#include "launch/command_line.h"
#include "launch/console.h"
#include "launch/run_directory.h"
#include "trainer/model/load.h"

namespace launch {

int evaluate_command(const Arguments& arguments, Job& job) {
  CommandLine line;
  line.usage = "evaluate RUN|CHECKPOINT [options]";
  line.description =
      "Measures perplexity and bits per byte on the validation split, plain decoding, and every drafter, "
      "acceptance\n"
      "rule and temperature of [decode]. Writes report.json and report.html and prints the table.";
  line.examples =
      "  foretell evaluate runs/mine\n"
      "  foretell evaluate runs/mine/checkpoints/step_00000600 --output /tmp/report\n"
      "  foretell evaluate runs/mine --set decode.drafters=medusa,ngram --set decode.prompts=20";
  line.arguments = {"RUN"};
  line.flags.add_options()                                                        //
      ("output", text(), "folder of the report; the run directory if not given")  //
      ("set", repeatable(), "section.key=value, for [decode], [data], [train] and [log]; repeatable");
  const auto values = line.parse(arguments);
  if (!values) return 0;
  comm::Session& session = job.join_alone("evaluate");
  Placement placement;
  Stopwatch watch;
  trainer::LoadedModel loaded = trainer::load_model_on(
      [&](const configs::Config& config) {
        placement = place(session, true, config.train.device, config.train.threads);
        return placement.ctx;
      },
      value<std::string>(*values, "RUN"), list(*values, "set"));
  const kernels::Context& ctx = placement.ctx;
  const std::filesystem::path run = run_of(loaded.checkpoint);
  const std::filesystem::path output(values->count("output") ? value<std::string>(*values, "output")
                                                             : run.string());
  fmt::print("evaluating {} (step {}) on {}\n", loaded.checkpoint.string(), loaded.step,
             kernels::describe(ctx.device));
  trainer::evaluate(ctx, loaded, run, output, [&](const std::string& part) {
    fmt::print("[{:>7}] {}\n", time_text(watch.seconds()), part);
    std::fflush(stdout);
  });
  fmt::print("\n{}\nreport: {}\n", trainer::report_table(output / "report.json"),
             (output / "report.html").string());
  return 0;
}

}  // namespace launch

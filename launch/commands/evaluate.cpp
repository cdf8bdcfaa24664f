#include "trainer/decode/evaluate.h"

#include <fmt/format.h>

#include <cstdio>

#include "launch/console.h"
#include "launch/placed_model.h"
#include "launch/run_directory.h"

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
  Stopwatch watch;
  PlacedModel model = load_alone(job, "evaluate", *values);
  trainer::LoadedModel& loaded = model.loaded;
  const std::filesystem::path run = run_of(loaded.checkpoint);
  const std::filesystem::path output(values->count("output") ? value<std::string>(*values, "output")
                                                             : run.string());
  fmt::print("evaluating {} (step {}) on {}\n", loaded.checkpoint.string(), loaded.step,
             kernels::describe(model.ctx().device));
  trainer::evaluate(model.ctx(), loaded, run, output, [&](const std::string& part) {
    fmt::print("[{:>7}] {}\n", time_text(watch.seconds()), part);
    std::fflush(stdout);
  });
  fmt::print("\n{}\nreport: {}\n", trainer::report_table(output / "report.json"),
             (output / "report.html").string());
  return 0;
}

}  // namespace launch

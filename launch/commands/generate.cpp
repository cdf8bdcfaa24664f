#include <fmt/format.h>

#include <cstdio>

#include "kernels/core/error.h"
#include "launch/console.h"
#include "launch/placed_model.h"
#include "trainer/decode/evaluate.h"

namespace launch {
namespace {

CommandLine command_line() {
  CommandLine line;
  line.usage = "generate RUN|CHECKPOINT --prompt TEXT [options]";
  line.description =
      "Continues TEXT and prints it as it comes. With a drafter several tokens may come in one step; a "
      "terminal shows\n"
      "in colour how many did.";
  line.examples =
      "  foretell generate runs/mine --prompt 'Once upon'\n"
      "  foretell generate runs/mine --prompt 'Once upon' --drafter medusa --max-tokens 300\n"
      "  foretell generate runs/mine --prompt 'Once upon' --temperature 0.8 --drafter mtp --acceptance "
      "rejection";
  line.arguments = {"RUN"};
  line.flags.add_options()                                                                          //
      ("prompt", text(), "text to continue; required")                                              //
      ("max-tokens", po::value<int64_t>()->default_value(128), "tokens to add")                     //
      ("drafter", text()->default_value("none"), "none, medusa, medusa_tree, mtp or ngram")         //
      ("acceptance", text(), "greedy, rejection or typical; follows the temperature if not given")  //
      ("temperature", text()->default_value("0"), "0 takes the likeliest token")                    //
      ("seed", po::value<int64_t>()->default_value(1), "seed of sampling")                          //
      ("set", repeatable(), "section.key=value, for [decode] and [train]; repeatable");
  return line;
}

void require_name(const CommandLine& line, const char* flag, const std::string& given,
                  const std::vector<std::string>& known) {
  for (const std::string& name : known)
    if (given == name) return;
  const std::string near = configs::nearest_name(given, known);
  line.wrong_use(fmt::format("--{} {} is not known{}", flag, given,
                             near.empty() ? "" : fmt::format("; did you mean {}?", near)));
}

trainer::GenerateOptions options_of(const CommandLine& line, const po::variables_map& values) {
  if (!values.count("prompt")) line.wrong_use("--prompt is missing");
  trainer::GenerateOptions options;
  options.prompt = value<std::string>(values, "prompt");
  options.max_tokens = value<int64_t>(values, "max-tokens");
  options.drafter = value<std::string>(values, "drafter");
  try {
    options.temperature = configs::parse_temperature(value<std::string>(values, "temperature"));
  } catch (const kernels::ConfigError& error) {
    line.wrong_use(fmt::format("--temperature {}", error.what()));
  }
  const int64_t seed = value<int64_t>(values, "seed");
  if (seed < 0) line.wrong_use("--seed is negative");
  options.seed = static_cast<uint64_t>(seed);
  options.acceptance = options.temperature > 0 ? "rejection" : "greedy";
  if (values.count("acceptance")) options.acceptance = value<std::string>(values, "acceptance");
  if (options.prompt.empty()) line.wrong_use("--prompt is empty");
  if (options.max_tokens < 1 || options.max_tokens > 1000000)
    line.wrong_use("--max-tokens must be between 1 and 1000000");
  if (options.acceptance == "greedy" && options.temperature > 0)
    line.wrong_use("--acceptance greedy takes the likeliest token; leave --temperature at 0");
  std::vector<std::string> drafters = {"none"};
  for (const configs::DrafterName& drafter : configs::drafter_names()) drafters.push_back(drafter.name);
  require_name(line, "drafter", options.drafter, drafters);
  require_name(line, "acceptance", options.acceptance, configs::acceptance_names());
  return options;
}

// One colour for each number of tokens that came in a step: 1 plain, then green, cyan, magenta, yellow and
// up.
std::string coloured(const std::string& text, size_t tokens) {
  constexpr int kColours[] = {0, 0, 32, 36, 35, 33};
  const size_t last = std::size(kColours) - 1;
  return fmt::format("\033[{}m{}\033[0m", kColours[std::min(tokens, last)], text);
}

// The first token comes from reading the prompt: steps and their speed are those after it.
std::string summary(const trainer::Generated& generated) {
  if (generated.steps == 0 || generated.seconds <= 0)
    return fmt::format("{} token{}", generated.tokens, generated.tokens == 1 ? "" : "s");
  const double gained = static_cast<double>(generated.step_tokens);
  return fmt::format("{} tokens; after the first, {} step{}: {:.2f} tokens a step, {:.0f} tokens per second",
                     generated.tokens, generated.steps, generated.steps == 1 ? "" : "s",
                     gained / static_cast<double>(generated.steps), gained / generated.seconds);
}

}  // namespace

int generate_command(const Arguments& arguments, Job& job) {
  CommandLine line = command_line();
  const auto values = line.parse(arguments);
  if (!values) return 0;
  const trainer::GenerateOptions options = options_of(line, *values);
  PlacedModel model = load_alone(job, "generate", *values);
  const bool colour = on_terminal();
  fmt::print("{}", options.prompt);
  std::fflush(stdout);
  const trainer::Generated generated =
      trainer::generate(model.ctx(), model.loaded, options, [&](const std::string& piece, int64_t tokens) {
        fmt::print("{}", colour ? coloured(piece, static_cast<size_t>(tokens)) : piece);
        std::fflush(stdout);
      });
  fmt::print("\n\n{}\n", summary(generated));
  return 0;
}

}  // namespace launch

#include "trainer/decode/costs.h"
#include "trainer/decode/evaluate.h"
#include "trainer/decode/text_stream.h"

namespace trainer {

namespace {

DecodeSettings settings_of(const LoadedModel& loaded, const GenerateOptions& options) {
  DecodeSettings settings;
  settings.acceptance = parse_acceptance(options.acceptance);
  settings.temperature = options.temperature;
  if (options.temperature < 0)
    throw kernels::ConfigError("the temperature cannot be negative: use 0 for the likeliest token");
  if (options.temperature == 0)
    settings.acceptance = Acceptance::greedy;
  else if (settings.acceptance == Acceptance::greedy)
    settings.acceptance = Acceptance::rejection;
  constexpr int64_t kGuard = 6;  // where no held-out text says which one
  const int64_t no_repeat = loaded.config.decode.no_repeat;
  settings.no_repeat = no_repeat < 0 ? kGuard : no_repeat;
  settings.typical_epsilon = loaded.config.decode.typical_epsilon;
  settings.typical_delta = loaded.config.decode.typical_delta;
  settings.seed = options.seed;
  settings.end_of_text = loaded.tokenizer->end_of_text();
  settings.max_tokens = options.max_tokens;
  return settings;
}

// Without a measured acceptance: each further draft is accepted with the same probability. Only for greedy
// decoding, where the number of drafts cannot change the text.
void choose_from_costs(Decoder& decoder, Drafter& drafter, const DecodeSettings& settings) {
  constexpr double kAcceptance = 0.6;
  const int64_t most = drafter.max_drafts();
  AcceptanceEstimate estimate;
  for (int64_t d = 0; d < most; ++d) {
    estimate.reach.push_back((d == 0 ? 1 : estimate.reach.back()) * kAcceptance);
    estimate.drafted.push_back(1);
  }
  if (!drafter.node_values().empty()) estimate.reach = drafter.node_values();
  const auto costs = measure_step_costs(decoder, most + 1, settings);
  drafter.set_drafts(choose_drafts(costs, estimate, {}, most).drafts);
}

}  // namespace

Generated generate(const Context& ctx, LoadedModel& loaded, const GenerateOptions& options,
                   const std::function<void(const std::string&, int64_t)>& on_text) {
  const DecodeSettings settings = settings_of(loaded, options);
  if (options.max_tokens < 1) throw kernels::ConfigError("max tokens must be at least 1");
  std::vector<int32_t> prompt = loaded.tokenizer->encode(options.prompt);
  // A document starts after the end of another.
  if (prompt.empty()) prompt.push_back(settings.end_of_text);
  const int64_t capacity =
      std::max<int64_t>(static_cast<int64_t>(prompt.size()) + settings.max_tokens, 2 * kernels::kFold);
  Decoder decoder(ctx, *loaded.model, 1, capacity);
  const std::unique_ptr<Drafter> drafter = make_drafter(decoder, options.drafter, loaded.config.decode);
  if (drafter != nullptr && settings.acceptance == Acceptance::greedy)
    choose_from_costs(decoder, *drafter, settings);

  TextStream stream(*loaded.tokenizer, prompt);
  Generated result;
  const auto emit = [&](const std::string& text, int64_t tokens) {
    if (text.empty()) return;
    result.text += text;
    if (on_text) on_text(text, tokens);
  };
  const DecodeRun run =
      decoder.run({&prompt, 1}, settings, drafter.get(), [&](int64_t, std::span<const int32_t> tokens) {
        emit(stream.add(tokens), static_cast<int64_t>(tokens.size()));
      });
  emit(stream.finish(), 0);
  result.tokens = static_cast<int64_t>(run.sequences[0].tokens.size());
  result.steps = run.steps;
  result.step_tokens = run.tokens;
  result.seconds = run.seconds();
  result.accepted = run.sequences[0].gained;
  return result;
}

}  // namespace trainer

// Decoding on a GPU: speculation writes the plain text there too, and recorded steps compute what eager ones
// do.
#include <gtest/gtest.h>

#include <limits>

#include "kernels/core/stream.h"
#include "tests/trainer/decode_model.h"
#include "trainer/decode/costs.h"
#include "trainer/decode/decoder.h"
#include "trainer/decode/repetition.h"

namespace trainer {
namespace {

using decode_test::random_tokens;
using decode_test::tiny_model;
using decode_test::TinyOptions;
using Prompts = std::vector<std::vector<int32_t>>;

constexpr kernels::Device kGpu{kernels::Device::Kind::cuda, 0};
const kernels::Context kOnGpu{kGpu, {}, nullptr, false};
constexpr int64_t kCapacity = 320;

class DecodeCuda : public testing::Test {
 protected:
  void SetUp() override {
    if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU here: " << kernels::cuda_problem();
  }

  // The weights of tiny_model, on the GPU.
  static std::unique_ptr<Model> on_gpu(const TinyOptions& options, bool graph) {
    const auto source = tiny_model(options);
    configs::Config config = decode_test::tiny_config(options);
    config.train.graph = graph;
    auto model = std::make_unique<Model>(config, options.vocabulary);
    ParameterStore& store = model->parameters();
    store.allocate(kGpu, store.compute(), false);
    for (size_t id = 0; id < store.parameters().size(); ++id) {
      const Tensor from = source->parameters().weight(static_cast<int>(id)),
                   to = store.weight(static_cast<int>(id));
      kernels::copy_bytes(to.data, kGpu, from.data, {}, from.bytes());
    }
    model->prepare_decoding(kOnGpu);
    return model;
  }

  static DecodeSettings settings(Acceptance acceptance = Acceptance::greedy) {
    DecodeSettings settings;
    settings.acceptance = acceptance;
    settings.temperature = acceptance == Acceptance::greedy ? 0 : 1;
    settings.max_tokens = 150;
    return settings;
  }

  static std::vector<std::vector<int32_t>> texts(const DecodeRun& run) {
    std::vector<std::vector<int32_t>> texts;
    for (const DecodedSequence& sequence : run.sequences) texts.push_back(sequence.tokens);
    return texts;
  }
};

std::vector<TinyOptions> models() {
  std::vector<TinyOptions> all;
  for (const char* compute : {"fp32", "fp16", "bf16"})
    for (const char* attention : {"linear", "softmax", "linear,softmax"}) {
      TinyOptions options;
      options.attention = attention;
      options.compute = compute;
      options.mtp = compute == std::string("fp16") ? 2 : 1;
      options.medusa_sequential = attention == std::string("linear");
      all.push_back(options);
    }
  // Heads of 32: attention on tensor cores.
  for (const char* compute : {"fp16", "bf16"}) {
    TinyOptions options;
    options.attention = "softmax,linear";
    options.compute = compute;
    options.width = 128;
    options.medusa_sequential = compute == std::string("bf16");
    all.push_back(options);
  }
  return all;
}

// Over several folds; every drafter of the table: chains, trees, MTP within and beyond its depths, n-grams.
TEST_F(DecodeCuda, GreedyTextIsThatOfPlainDecoding) {
  for (const TinyOptions& options : models()) {
    const auto model = on_gpu(options, true);
    Decoder decoder(kOnGpu, *model, 1, kCapacity);
    for (const int64_t length : {1, 37, 64}) {
      const Prompts prompts = {random_tokens(length, 100 + static_cast<uint64_t>(length))};
      const DecodeRun plain = decoder.run(prompts, settings());
      ASSERT_EQ(plain.sequences[0].tokens.size(), 150u);
      for (const DrafterKind& kind : drafters()) {
        const auto drafter = make_drafter(decoder, kind.name, model->config().decode);
        const DecodeRun fast = decoder.run(prompts, settings(), drafter.get());
        EXPECT_EQ(texts(fast), texts(plain))
            << kind.name << ", " << options.attention << " " << options.compute << " after " << length;
      }
    }
    EXPECT_TRUE(decoder.captured());
  }
}

// With the guard against loops too, which looks at other logits than the largest.
TEST_F(DecodeCuda, GuardedTextIsThatOfPlainDecoding) {
  TinyOptions options;
  options.compute = "fp16";
  options.width = 128;
  const auto model = on_gpu(options, true);
  Decoder decoder(kOnGpu, *model, 1, kCapacity);
  DecodeSettings guarded = settings();
  guarded.no_repeat = 2;
  const Prompts prompts = {random_tokens(20, 9)};
  const DecodeRun plain = decoder.run(prompts, guarded);
  EXPECT_NE(texts(plain), texts(decoder.run(prompts, settings()))) << "nothing was refused";
  const std::vector<int32_t>& tokens = plain.sequences[0].tokens;
  for (size_t i = 0; i < tokens.size(); ++i)
    EXPECT_FALSE(repeats_run({tokens.data(), i}, tokens[i], guarded.no_repeat)) << "at " << i;
  for (const DrafterKind& kind : drafters()) {
    const auto drafter = make_drafter(decoder, kind.name, model->config().decode);
    EXPECT_EQ(texts(decoder.run(prompts, guarded, drafter.get())), texts(plain)) << kind.name;
  }
}

// Whatever the rule and the drafter, a recorded step is the eager step bit for bit: so are the texts.
TEST_F(DecodeCuda, CapturedEqualsEager) {
  TinyOptions options;
  options.compute = "fp16";
  for (const bool sequential : {false, true}) {
    options.medusa_sequential = sequential;
    const auto eager_model = on_gpu(options, false), model = on_gpu(options, true);
    Decoder eager(kOnGpu, *eager_model, 3, kCapacity), captured(kOnGpu, *model, 3, kCapacity);
    const Prompts prompts = {random_tokens(20, 1), random_tokens(64, 2), random_tokens(3, 3)};
    for (const Acceptance rule : {Acceptance::greedy, Acceptance::rejection, Acceptance::typical}) {
      EXPECT_EQ(texts(captured.run(prompts, settings(rule))), texts(eager.run(prompts, settings(rule))));
      for (const DrafterKind& kind : drafters()) {
        const auto a = make_drafter(captured, kind.name, model->config().decode);
        const auto b = make_drafter(eager, kind.name, eager_model->config().decode);
        for (int again = 0; again < 2; ++again)
          EXPECT_EQ(texts(captured.run(prompts, settings(rule), a.get())),
                    texts(eager.run(prompts, settings(rule), b.get())))
              << kind.name << ", " << to_string(rule);
      }
    }
    EXPECT_TRUE(captured.captured());
    EXPECT_FALSE(eager.captured());
  }
}

// In fp32 the GPU writes the CPU's text and drafts what the CPU drafts, as far as rounding leaves the choice
// alone: sums of some hundred terms in another order move a logit by about 1e-5 of its size, and the choices
// of these texts are clearer.
TEST_F(DecodeCuda, WritesTheTextOfTheCpuAndItsDrafts) {
  TinyOptions options;
  for (const bool sequential : {false, true}) {
    options.medusa_sequential = sequential;
    const auto cpu = tiny_model(options), gpu = on_gpu(options, true);
    Decoder there(kOnGpu, *gpu, 1, kCapacity), here({}, *cpu, 1, kCapacity);
    const Prompts prompts = {random_tokens(30, 8)};
    EXPECT_EQ(texts(there.run(prompts, settings())), texts(here.run(prompts, settings())));
    for (const DrafterKind& kind : drafters()) {
      const auto a = make_drafter(there, kind.name, gpu->config().decode);
      const auto b = make_drafter(here, kind.name, cpu->config().decode);
      const DecodeRun run = there.run(prompts, settings(), a.get()),
                      expected = here.run(prompts, settings(), b.get());
      EXPECT_EQ(texts(run), texts(expected)) << kind.name;
      EXPECT_EQ(run.drafted, expected.drafted) << kind.name;
      EXPECT_EQ(run.accepted, expected.accepted) << kind.name;
    }
  }
}

// One token of text is the prefill's: no step follows.
TEST_F(DecodeCuda, APrefillIsRecorded) {
  const auto model = on_gpu({}, true);
  Decoder decoder(kOnGpu, *model, 1, kCapacity);
  DecodeSettings first = settings();
  first.max_tokens = 1;
  const Prompts prompts = {random_tokens(100, 3)};
  const DecodeRun eager = decoder.run(prompts, first);
  EXPECT_FALSE(decoder.captured());
  for (int again = 0; again < 2; ++again) EXPECT_EQ(texts(decoder.run(prompts, first)), texts(eager));
  EXPECT_TRUE(decoder.captured());
}

// Drafts that nothing could be drawn for are -1 until the host sees them: rows of the embedding on the
// device.
TEST_F(DecodeCuda, AModelOfNaNWritesTokens) {
  TinyOptions options;
  options.sharpness = std::numeric_limits<double>::quiet_NaN();
  const Prompts prompts = {random_tokens(20, 5)};
  for (const bool sequential : {false, true}) {
    options.medusa_sequential = sequential;
    const auto model = on_gpu(options, true);
    Decoder decoder(kOnGpu, *model, 1, kCapacity);
    for (const DrafterKind& kind : drafters())
      for (const Acceptance rule : {Acceptance::greedy, Acceptance::rejection, Acceptance::typical}) {
        const auto drafter = make_drafter(decoder, kind.name, model->config().decode);
        const DecodeRun run = decoder.run(prompts, settings(rule), drafter.get());
        for (const int32_t token : run.sequences[0].tokens)
          ASSERT_TRUE(token >= 0 && token < options.vocabulary) << kind.name << " " << to_string(rule);
      }
  }
}

// However many drafts: each goes on from the one ahead on the device.
TEST_F(DecodeCuda, DraftsOfAChainWaitOnce) {
  TinyOptions options;
  options.medusa_sequential = true;
  const auto model = on_gpu(options, true);
  Decoder decoder(kOnGpu, *model, 1, kCapacity);
  for (const char* name : {"mtp", "medusa"}) {
    const auto drafter = make_drafter(decoder, name, model->config().decode);
    const Prompts prompts = {random_tokens(20, 5)};
    decoder.run(prompts, settings(), drafter.get());
    const auto& counters = kernels::device_counters();
    const int64_t waits = counters.synchronizations;
    const DecodeRun run = decoder.run(prompts, settings(), drafter.get());
    // Drafts and verification; ahead of them a fresh state and the prefill's token.
    EXPECT_LE(counters.synchronizations - waits, 2 * run.steps + 4) << name;
    EXPECT_GT(run.drafted[1], 0) << name << ": one draft at a time";
  }
}

// After the first steps nothing is allocated, and a plain step waits once.
TEST_F(DecodeCuda, AStepWaitsOnceAndTakesNoMemory) {
  const auto model = on_gpu({}, true);
  Decoder decoder(kOnGpu, *model, 1, kCapacity);
  decoder.measure_step(1, 70, 4, settings());
  const auto& counters = kernels::device_counters();
  const int64_t waits = counters.synchronizations, allocations = counters.allocations;
  constexpr int64_t kSteps = 6;
  decoder.measure_step(1, 70, kSteps, settings());
  // Another wait is that for a fresh state, before the first step.
  EXPECT_EQ(counters.synchronizations - waits, kSteps + 1);
  EXPECT_EQ(counters.allocations, allocations);
}

// More rows than one sequence's fold leaves room for never come; any other number has its own recording.
TEST_F(DecodeCuda, EveryNumberOfRows) {
  const auto model = on_gpu({}, true);
  Decoder decoder(kOnGpu, *model, 1, kCapacity);
  for (const double seconds : measure_step_costs(decoder, 64, settings())) EXPECT_GT(seconds, 0);
}

}  // namespace
}  // namespace trainer

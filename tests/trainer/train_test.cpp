// The training job of one rank: what it writes, how it stops and goes on, what it refuses.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <fstream>
#include <map>
#include <stdexcept>

#include "checkpoints/checkpoint.h"
#include "data/prepare.h"
#include "kernels/core/error.h"
#include "tests/support/tiny_run.h"
#include "trainer/train/loop.h"
#include "trainer/train/metrics.h"
#include "trainer/train/step.h"

namespace {

namespace fs = std::filesystem;
using support::tiny_config;

class Train : public testing::Test {
 protected:
  void SetUp() override { support::prepare_tiny_data(folder_.path()); }

  trainer::TrainResult train(const configs::Config& config, trainer::TrainOptions options = {}) {
    const auto ranks = comm::make_local_communicator();
    return trainer::train(config, *ranks, kernels::Context{}, options);
  }
  configs::Config named(const std::string& run) {
    configs::Config config = tiny_config(folder_.path());
    config.log.run = (folder_.path() / run).string();
    return config;
  }
  std::map<std::string, std::vector<char>> state(const configs::Config& config) {
    return support::stored_state(config.log.run);
  }
  std::string message_of(const std::function<void()>& action) {
    try {
      action();
    } catch (const kernels::Error& e) {
      return e.what();
    }
    return "";
  }

  support::TemporaryFolder folder_;
};

TEST_F(Train, LearnsAndWritesTheRunDirectory) {
  auto config = named("learn");
  config.train.steps = 30;
  config.train.validate_every = 30;
  const auto result = train(config);
  EXPECT_EQ(result.reason, trainer::StopReason::finished);
  EXPECT_EQ(result.step, 30);
  const auto losses = support::metric(config.log.run, "loss");
  ASSERT_EQ(losses.size(), 30u);
  EXPECT_LT(losses.back(), losses.front() - 1.0) << "nats per byte";
  EXPECT_EQ(support::metric(config.log.run, "validation_loss").size(), 1u);
  EXPECT_TRUE(fs::exists(fs::path(config.log.run) / "config.resolved.cfg"));
  EXPECT_TRUE(fs::exists(result.checkpoint / "manifest.json"));
}

TEST_F(Train, StoppedAndResumedEqualsUninterruptedBitForBit) {
  for (const char* compute : {"fp16", "bf16", "fp32"}) {
    auto whole = named(std::string("whole_") + compute), parts = named(std::string("parts_") + compute);
    whole.precision.compute = parts.precision.compute = compute;
    whole.precision.loss_scale_growth_interval = parts.precision.loss_scale_growth_interval = 3;
    train(whole);
    int calls = 0;
    trainer::TrainOptions stop, resume;
    stop.stop_requested = [&] { return ++calls == 5; };  // in the middle of an epoch
    EXPECT_EQ(train(parts, stop).reason, trainer::StopReason::asked_to_stop);
    EXPECT_EQ(support::metric(parts.log.run, "loss").size(), 5u);
    resume.resume = "auto";
    EXPECT_EQ(train(parts, resume).reason, trainer::StopReason::finished);
    EXPECT_EQ(support::metric(whole.log.run, "loss"), support::metric(parts.log.run, "loss"));
    EXPECT_EQ(support::metric(whole.log.run, "loss_scale"), support::metric(parts.log.run, "loss_scale"));
    EXPECT_TRUE(state(whole) == state(parts)) << compute;
  }
}

// A crash between checkpoints: the run goes on from the last one, makes the lost steps again, and ends the
// same.
TEST_F(Train, KilledAndResumedEqualsUninterruptedBitForBit) {
  auto whole = named("whole"), parts = named("parts");
  whole.checkpoint.every = parts.checkpoint.every = 3;
  train(whole);
  int calls = 0;
  trainer::TrainOptions crash, resume;
  crash.stop_requested = [&]() -> bool {
    if (++calls == 6) throw std::runtime_error("killed");
    return false;
  };
  EXPECT_THROW(train(parts, crash), std::runtime_error);
  resume.resume = "auto";
  train(parts, resume);
  EXPECT_EQ(support::metric(whole.log.run, "loss"), support::metric(parts.log.run, "loss"));
  EXPECT_TRUE(state(whole) == state(parts));
}

// No space left for the last save: an error that says so, and nothing half-written. The limit on file sizes
// stands in for a full disk.
TEST_F(Train, AFinalSaveThatFailsIsAnError) {
  auto config = named("full");
  config.train.steps = 3;
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  rlimit small = before;
  small.rlim_cur = 100000;
  setrlimit(RLIMIT_FSIZE, &small);
  const std::string message = message_of([&] { train(config); });
  setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_NE(message.find("could not be saved"), std::string::npos) << message;
  EXPECT_FALSE(checkpoints::has_steps(fs::path(config.log.run) / "checkpoints"));
}

// The limit is lifted when the save of step 3 has failed: the one of step 6 waited for it.
TEST_F(Train, ASaveThatFailsOnTheWayIsAWarning) {
  auto config = named("full_once");
  config.train.steps = 9;
  config.checkpoint.every = 3;
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  rlimit small = before;
  small.rlim_cur = 100000;
  setrlimit(RLIMIT_FSIZE, &small);
  int calls = 0;
  trainer::TrainOptions options;
  options.stop_requested = [&] {
    if (++calls == 8) setrlimit(RLIMIT_FSIZE, &before);
    return false;
  };
  testing::internal::CaptureStderr();
  const auto result = train(config, options);
  setrlimit(RLIMIT_FSIZE, &before);
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_NE(said.find("could not be saved"), std::string::npos) << said;
  EXPECT_NE(said.find("training goes on"), std::string::npos) << said;
  EXPECT_EQ(result.checkpoint.filename(), "step_00000009");
}

// Its checkpoints would be older than those that are there, and the first to go.
TEST_F(Train, GoingBackInAFolderOfNewerStepsIsRefused) {
  auto config = named("back");
  config.checkpoint.every = 2;
  config.checkpoint.keep = 10;
  train(config);
  trainer::TrainOptions back;
  back.resume = (fs::path(config.log.run) / "checkpoints" / "step_00000002").string();
  const std::string message = message_of([&] { train(config, back); });
  EXPECT_NE(message.find("move newer steps away, or choose another log.run"), std::string::npos) << message;
  auto elsewhere = named("elsewhere");
  EXPECT_EQ(train(elsewhere, back).step, config.train.steps);
}

TEST_F(Train, NothingLeftToDoNamesTheCheckpointItCameFrom) {
  auto config = named("done");
  train(config);
  trainer::TrainOptions again;
  again.resume = checkpoints::resolve(config.log.run, {}).string();
  EXPECT_EQ(train(named("nothing"), again).checkpoint, again.resume);
}

TEST_F(Train, ValidationsBeforeACheckpointAreKept) {
  auto config = named("validated");
  config.train.steps = 4;
  config.train.validate_every = 2;
  train(config);
  config.train.steps = 8;
  trainer::TrainOptions resume;
  resume.resume = "auto";
  train(config, resume);
  EXPECT_EQ(support::metric(config.log.run, "validation_loss").size(), 4u);
}

// Not buffered: what is lost with a killed run must be its own steps alone.
TEST_F(Train, KeptMetricsAreOnDiskBeforeTheFirstStep) {
  auto config = named("kept");
  train(config);
  const auto before = support::metric(config.log.run, "loss");
  const trainer::MetricsLog log(config.log.run, 3, 5, 1, {"loss"}, false);
  const auto kept = support::metric(config.log.run, "loss");
  EXPECT_EQ(kept, std::vector<double>(before.begin(), before.begin() + 3));
}

TEST_F(Train, TextForValidationIsNotNeeded) {
  data::PrepareParams params;
  params.inputs = {(folder_.path() / "text").string()};
  params.output = (folder_.path() / "all").string();
  params.tokenizer = "bytes";
  params.validation_fraction = 0;
  support::write_tiny_text(folder_.path() / "text");
  data::prepare(params, {});
  auto config = named("unvalidated");
  config.data.path = params.output;
  config.train.validate_every = 2;
  EXPECT_EQ(train(config).step, config.train.steps);
  EXPECT_TRUE(support::metric(config.log.run, "validation_loss").empty());
}

// All losses are the same here, so that the first of the steps that are saved is the best.
TEST_F(Train, TheBestIsAStepThatIsSaved) {
  auto config = named("best");
  config.train.steps = 8;
  config.train.validate_every = 2;
  config.checkpoint.every = 4;
  config.optim.lr = 0;
  const checkpoints::Reader reader(train(config).checkpoint);
  EXPECT_EQ(reader.attributes().integers.at("best_step"), 4);
}

TEST_F(Train, OverflowSkipsTheStepAndHalvesTheScale) {
  auto config = named("overflow");
  config.precision.loss_scale_initial = 4294967296.0;
  config.train.steps = 24;
  train(config);
  const auto skipped = support::metric(config.log.run, "skipped"),
             scale = support::metric(config.log.run, "loss_scale");
  ASSERT_EQ(skipped.size(), 24u);
  EXPECT_EQ(skipped[0], 1.0) << "a scale of 2^32 overflows fp16";
  EXPECT_EQ(scale[1], scale[0] / 2);
  EXPECT_EQ(skipped.back(), 0.0) << "the scale came down to where training goes on";
  const checkpoints::Reader reader(checkpoints::resolve(config.log.run, {}));
  EXPECT_LT(reader.attributes().integers.at("updates"), reader.attributes().integers.at("step"));
}

TEST_F(Train, GivesUpWhenEveryStepOverflows) {
  auto config = named("hopeless");
  config.precision.loss_scale_initial = 4294967296.0;
  config.precision.max_consecutive_skips = 3;
  const std::string message = message_of([&] { train(config); });
  EXPECT_NE(message.find("3 steps in a row overflowed"), std::string::npos) << message;
  EXPECT_NE(message.find("weight"), std::string::npos) << "names the tensor: " << message;
  EXPECT_NE(message.find("rank 0"), std::string::npos) << message;
}

TEST_F(Train, RefusesASecondRunIntoTheSameFolder) {
  auto config = named("twice");
  config.train.steps = config.optim.warmup = 2;
  train(config);
  EXPECT_THROW(train(config), kernels::ConfigError);
  trainer::TrainOptions resume;
  resume.resume = "auto";
  EXPECT_EQ(train(config, resume).step, 2);
}

TEST_F(Train, RefusesACheckpointOfAnotherArchitecture) {
  auto config = named("shape");
  config.train.steps = config.optim.warmup = 2;
  train(config);
  config.model.ffn_width = 96;
  config.train.steps = 4;
  trainer::TrainOptions resume;
  resume.resume = "auto";
  const std::string message = message_of([&] { train(config, resume); });
  EXPECT_NE(message.find("model.ffn_width"), std::string::npos) << message;
}

// Of the same shapes, another function; and heads that would be lost.
TEST_F(Train, RefusesACheckpointOfAnotherModelOfTheSameShapes) {
  auto config = named("same_shape");
  train(config);
  trainer::TrainOptions resume;
  resume.resume = "auto";
  const auto refusal = [&](const configs::Config& other) {
    return message_of([&] { train(other, resume); });
  };
  auto other = config;
  other.model.rope_theta *= 2;
  EXPECT_NE(refusal(other).find("model.rope_theta"), std::string::npos) << refusal(other);
  other = config;
  other.heads.mtp = 0;
  EXPECT_NE(refusal(other).find("mtp.1."), std::string::npos) << refusal(other);
  EXPECT_NE(refusal(other).find("would lose"), std::string::npos) << refusal(other);
}

TEST_F(Train, FineTunesHeadsOnAFrozenTrunk) {
  auto base = named("base");
  base.heads.medusa = base.heads.mtp = 0;
  train(base);
  auto heads = named("heads");
  heads.heads.mtp = 0;
  heads.train.init_from = base.log.run;
  heads.train.trainable = "heads";
  train(heads);
  auto before = state(base), after = state(heads);
  EXPECT_EQ(before.at("master/blocks.0.attention.q.weight"), after.at("master/blocks.0.attention.q.weight"));
  EXPECT_EQ(before.at("master/embedding.weight"), after.at("master/embedding.weight"));
  const auto& w = after.at("master/medusa.0.layers.0.weight");
  EXPECT_NE(std::vector<char>(w.size(), 0), w) << "the new head has moved from its zero start";
}

TEST_F(Train, RefusesWeightsOfAnotherTokenizer) {
  // Two vocabularies of the same size, learned from different words.
  std::ofstream other(folder_.path() / "other.txt");
  for (int i = 0; i < 400; ++i) other << "while unsigned double template namespace " << i << '\n';
  other.close();
  const auto prepared = [&](const std::string& name, const std::filesystem::path& text) {
    data::PrepareParams params;
    params.inputs = {text.string()};
    params.output = folder_.path() / name;
    params.tokenizer = "sentencepiece:300";
    params.validation_fraction = 0.2;
    data::prepare(params, [](const std::string&, double) {});
    return params.output.string();
  };
  auto base = named("base");
  base.data.path = prepared("words", folder_.path() / "text");
  base.train.steps = 4;
  train(base);
  auto tuned = named("tuned");
  tuned.data.path = prepared("other_words", folder_.path() / "other.txt");
  tuned.train.init_from = base.log.run;
  const std::string message = message_of([&] { train(tuned); });
  EXPECT_NE(message.find("another tokenizer"), std::string::npos) << message;
}

TEST_F(Train, PlanCountsWhatARunTakes) {
  const auto plan = trainer::plan(tiny_config(folder_.path()), 257, 2);
  int64_t weights = 0, saved = 0;
  for (const auto& row : plan.rows) {
    if (row.segment == "weights") weights += row.bytes;
    if (row.segment == "saved") saved += row.bytes;
  }
  EXPECT_EQ(weights, plan.parameters * 2);
  EXPECT_GT(saved, 0);
  EXPECT_EQ(plan.micro_batches_per_rank, 2);
  EXPECT_GT(plan.seconds_per_step, 0);
}

TEST_F(Train, PlanSaysWhatDoesNotFitAndWhatWouldHelp) {
  auto config = tiny_config(folder_.path());
  EXPECT_EQ(trainer::plan_memory(config, 257, 1, {}).problem, "");
  config.model.layers = 400;
  config.model.width = 32768;
  config.model.ffn_width = 131072;
  const std::string alone = trainer::plan_memory(config, 257, 1, {}).problem,
                    several = trainer::plan_memory(config, 257, 4, {}).problem;
  EXPECT_NE(alone.find("the largest parts are v "), std::string::npos) << alone;
  EXPECT_NE(alone.find("lower train.micro_batch, model.context"), std::string::npos) << alone;
  EXPECT_EQ(alone.find("comm.zero"), std::string::npos) << alone;
  EXPECT_NE(several.find("comm.zero = 1"), std::string::npos) << several;
}

TEST_F(Train, PlanIsWhatAStepTakes) {
  auto config = tiny_config(folder_.path());
  const data::TokenDataset dataset(config.data.path, "train", config.model.context);
  trainer::Model model(config, 257);
  const data::BatchLoader loader(
      dataset, {1, config.train.batch, config.train.micro_batch, config.model.context, model.offsets()});
  model.parameters().allocate({}, kernels::DType::f16, true);
  const auto ranks = comm::make_local_communicator();
  const trainer::Stepper stepper(config, model, loader, *ranks, {});
  std::map<std::string, int64_t> planned, taken;
  for (const auto& row : trainer::plan_memory(config, 257, 1, {}).rows) planned[row.segment] += row.bytes;
  for (const auto& arena : model.parameters().memory())
    taken[arena->segment()] += static_cast<int64_t>(arena->high_water());
  const auto& step = stepper.rehearsal();
  for (const auto* arena : {step.saved.get(), step.scratch.get(), step.step.get()})
    taken[arena->segment()] += static_cast<int64_t>(arena->high_water());
  EXPECT_EQ(planned, taken) << "to the byte";
}

// A head multiplies by an unembedding of its own as by the trunk's. Of a frozen trunk nothing is trained but
// the heads: two products of the shared one are left for each of them, its own loss' and the gradient of its
// input.
TEST_F(Train, PlanCountsTheUnembeddingOfEveryLossOnce) {
  auto config = tiny_config(folder_.path());
  config.heads.mtp = 0;
  config.heads.medusa = 2;
  const auto operations = [&](const char* vocabulary, const char* trainable, int64_t tokens) {
    config.heads.medusa_vocabulary = vocabulary;
    config.train.trainable = trainable;
    return trainer::plan(config, tokens, 1).flop_per_token;
  };
  EXPECT_EQ(operations("shared", "all", 257), operations("own", "all", 257));
  const double product = 2.0 * 1000 * static_cast<double>(config.model.width);
  const auto of_a_thousand = [&](const char* vocabulary, const char* trainable) {
    return (operations(vocabulary, trainable, 1257) - operations(vocabulary, trainable, 257)) / product;
  };
  EXPECT_DOUBLE_EQ(of_a_thousand("shared", "all"), 9);    // three losses, forward and two gradients
  EXPECT_DOUBLE_EQ(of_a_thousand("shared", "heads"), 5);  // three forward, the input's gradient of two
  EXPECT_DOUBLE_EQ(of_a_thousand("own", "heads"), 7);
}

TEST_F(Train, PlanShowsWhatShardsSave) {
  auto config = tiny_config(folder_.path());
  const auto state_bytes = [&](int ranks) {
    int64_t bytes = 0;
    for (const auto& row : trainer::plan(config, 257, ranks).rows)
      if (row.segment == "master" || row.segment == "m" || row.segment == "v") bytes += row.bytes;
    return static_cast<double>(bytes);
  };
  const double whole = state_bytes(4);
  config.comm.zero = 1;
  EXPECT_EQ(state_bytes(1), whole);
  // A shard is rounded up to whole pieces of the buffers, of which there are some 200.
  EXPECT_NEAR(state_bytes(4) * 4 / whole, 1, 0.02);
}

}  // namespace

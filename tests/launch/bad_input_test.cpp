// Every wrong input gives one line that says what is wrong and what to do, and the right exit code; on
// several ranks too, without a banner of mpirun around it and with no rank left hanging.
#include <gtest/gtest.h>

#include "configs/config.h"
#include "kernels/core/device.h"
#include "tests/launch/program.h"

namespace launch {
namespace {

const std::string kQuickstart = FORETELL_SOURCE "/configs/presets/quickstart.cfg";

TEST(BadInput, Commands) {
  expect_one_line(foretell("trian"), 2, "unknown command 'trian'; did you mean 'train'?");
  expect_one_line(foretell("xyzzy"), 2, "`foretell --help` lists them");
}

TEST(BadInput, Flags) {
  expect_one_line(foretell("train --resum auto x.cfg"), 2, "did you mean --resume?");
  expect_one_line(foretell("train"), 2, "CONFIG is missing");
  expect_one_line(foretell("train a.cfg b.cfg"), 2, "too many arguments");
  expect_one_line(foretell("train a.cfg --set"), 2, "--help");
  expect_one_line(foretell("plan a.cfg --ranks two"), 2, "two");
  expect_one_line(foretell("plan " + kQuickstart + " --ranks 0"), 2, "--ranks 0");
  expect_one_line(foretell("prepare --output x"), 2, "--input is missing");
  expect_one_line(foretell("prepare --input x"), 2, "--output is missing");
  expect_one_line(foretell("prepare --input x --output y --val-fraction 1.5"), 2, "--val-fraction");
  expect_one_line(foretell("generate x"), 2, "--prompt is missing");
  expect_one_line(foretell("generate x --prompt a --drafter medussa"), 2, "did you mean medusa?");
  expect_one_line(foretell("generate x --prompt a --acceptance greedy --temperature 1"), 2, "--temperature");
  expect_one_line(foretell("config show"), 2, "list or describe");
  expect_one_line(foretell("config describe"), 2, "KEY is missing");
  expect_one_line(foretell("config describe modle.layers"), 2, "did you mean 'model.layers'?");
}

TEST(BadInput, ConfigurationFiles) {
  const TemporaryFolder folder;
  expect_one_line(foretell("train /nowhere/a.cfg"), 2, "/nowhere/a.cfg");
  expect_one_line(foretell("train " + folder.path().string()), 2, "is a folder");
  const std::string unknown = write_text(folder.path() / "unknown.cfg", "[model]\nlayer = 3\n");
  expect_one_line(foretell("train " + unknown), 2, "unknown.cfg:2: unknown key 'model.layer'");
  const std::string range = write_text(folder.path() / "range.cfg", "[model]\n\nlayers = 0\n");
  expect_one_line(foretell("train " + range), 2, "range.cfg:3: model.layers must be between");
  const std::string divide = write_text(folder.path() / "divide.cfg", "[model]\nwidth = 250\n");
  expect_one_line(foretell("train " + divide), 2, "not a multiple of model.heads");
  expect_one_line(foretell("train " + kQuickstart + " --set model.width"), 2, "section.key=value");
  expect_one_line(foretell("train " + kQuickstart + " --set data.path="), 2, "data.path is not set");
}

TEST(BadInput, DeviceThatIsNotThere) {
  const std::string train = "train " + kQuickstart + " --set train.device=cuda";
  const auto hidden = [](const std::string& command) {
    return run_shell("CUDA_VISIBLE_DEVICES= " FORETELL_BINARY " " + command);
  };
  expect_one_line(hidden(train), 2, "train.device = cuda, but ");
  expect_one_line(hidden(train), 2, "or use train.device = cpu");
  // auto takes what there is.
  const Outcome plan = hidden("plan " + kQuickstart + " --vocabulary 300 --set train.device=auto");
  EXPECT_EQ(plan.exit_code, 0) << plan.errors;
  EXPECT_NE(plan.output.find("(cpu: "), std::string::npos) << plan.output;
}

// Two ranks on one host and one GPU: asked for, it is refused; auto computes on CPU cores and says so.
TEST(BadInputCuda, MoreRanksThanGpus) {
  if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU here: " << kernels::cuda_problem();
  const std::string shell =
      "source " FORETELL_SOURCE "/launch/mpi_env.sh; CUDA_VISIBLE_DEVICES=0 mpirun -np 2 " FORETELL_BINARY;
  const std::string train = " train " + kQuickstart + " --dry-run --set train.device=";
  expect_one_line(run_shell(shell + train + "cuda"), 2, "2 ranks and 1 GPU; start at most 1 rank");
  const Outcome automatic = run_shell(shell + train + "auto");
  EXPECT_EQ(automatic.exit_code, 0) << automatic.errors;
  EXPECT_NE(automatic.errors.find("CPU cores"), std::string::npos) << automatic.errors;
}

TEST(BadInputCuda, APlanThatDoesNotFitIsRefusedBeforeAnythingIsLoaded) {
  if (kernels::cuda_device_count() == 0) GTEST_SKIP() << "no GPU here: " << kernels::cuda_problem();
  const TemporaryFolder folder;
  support::prepare_tiny_data(folder.path());
  configs::Config config = support::tiny_config(folder.path());
  config.train.device = "cuda";
  config.model.width = 16384;
  config.model.heads = config.model.kv_heads = 128;
  config.model.ffn_width = 65536;
  config.model.layers = 100;
  const std::string file = write_text(folder.path() / "a.cfg", configs::to_ini(config));
  const Outcome outcome = foretell("train " + file);
  expect_one_line(outcome, 2, "the largest parts are");
  EXPECT_NE(outcome.errors.find("lower train.micro_batch"), std::string::npos) << outcome.errors;
  EXPECT_FALSE(std::filesystem::exists(config.log.run));
}

TEST(BadInput, OnTwoRanksOnlyOneSpeaks) {
  const TemporaryFolder folder;
  const std::string range = write_text(folder.path() / "range.cfg", "[model]\nlayers = 0\n");
  expect_one_line(foretell_ranks(2, "train " + range), 2, "range.cfg:2: model.layers");
  expect_one_line(foretell_ranks(2, "train /nowhere/a.cfg"), 2, "/nowhere/a.cfg");
  expect_one_line(foretell_ranks(2, "train --resum auto x.cfg"), 2, "did you mean --resume?");
  expect_one_line(run_shell("export CUDA_VISIBLE_DEVICES=; source " FORETELL_SOURCE
                            "/launch/mpi_env.sh; mpirun -np 2 " FORETELL_BINARY " train " +
                            kQuickstart + " --set train.device=cuda"),
                  2, "train.device = cuda");
  expect_one_line(foretell_ranks(2, "config list"), 2, "start it without mpirun");
}

TEST(BadInput, OneRankAloneIsNamed) {
  const TemporaryFolder folder;
  const std::string range = write_text(folder.path() / "range.cfg", "[model]\nlayers = 0\n");
  // Only the second rank reads a bad file.
  const Outcome outcome =
      run_shell("source " FORETELL_SOURCE "/launch/mpi_env.sh; mpirun -np 1 " FORETELL_BINARY " train " +
                kQuickstart + " --dry-run : -np 1 " FORETELL_BINARY " train " + range);
  expect_one_line(outcome, 2, "foretell: rank 1: ");
}

TEST(BadInput, NumbersOutOfRange) {
  expect_one_line(foretell("generate /nowhere/run --prompt a --seed -1"), 2, "--seed is negative");
  expect_one_line(foretell("generate /nowhere/run --prompt a --temperature 101"), 2,
                  "--temperature must be between");
  for (const char* tiny : {"1e-46", "1e-400"})
    expect_one_line(foretell(std::string("generate /nowhere/run --prompt a --temperature ") + tiny), 2, tiny);
  expect_one_line(foretell("generate /nowhere/run --prompt a --temperature hot"), 2,
                  "--temperature 'hot' is not a number");
  expect_one_line(foretell("plan " + kQuickstart + " --vocabulary 99999999999999999"), 2,
                  "--vocabulary must be between 2 and 2147483647");
  expect_one_line(
      foretell("prepare --input /usr/include/fmt --output /nowhere --tokenizer sentencepiece:2000000"), 2,
      "between 288 and 1000000");
}

TEST(BadInput, MissingPaths) {
  expect_one_line(foretell("inspect /nowhere/run"), 74, "/nowhere/run");
  expect_one_line(foretell("inspect /usr/include"), 74, "is not a run, a checkpoint");
  expect_one_line(foretell("evaluate /nowhere/run"), 74, "/nowhere/run");
  expect_one_line(foretell("generate /nowhere/run --prompt a"), 74, "/nowhere/run");
}

}  // namespace
}  // namespace launch

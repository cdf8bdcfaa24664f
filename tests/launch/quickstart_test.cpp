// launch/quickstart.sh from text to report on a small model, as it runs on the real one.
#include <signal.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <thread>

#include "tests/launch/program.h"

namespace launch {
namespace {

namespace fs = std::filesystem;

class Quickstart : public testing::Test {
 protected:
  support::Process script() const {
    support::Process process;
    process.arguments = {"bash", FORETELL_SOURCE "/launch/quickstart.sh", "data.path=" + data_.string(),
                         "log.run=" + run_.string()};
    for (const char* setting :
         {"train.steps=60", "optim.warmup=5", "checkpoint.every=15", "train.validate_every=60",
          "train.validate_batches=2", "log.every=20", "model.layers=2", "model.width=32", "model.heads=2",
          "model.kv_heads=1", "model.ffn_width=64", "model.context=64", "decode.prompts=1",
          "decode.prompt_tokens=16", "decode.max_tokens=16", "decode.repeats=1"})
      process.arguments.push_back(setting);
    process.environment = {{"QUICKSTART_PROGRAM", FORETELL_BINARY},
                           {"QUICKSTART_TEXT", "/usr/include/fmt /nowhere"},
                           {"QUICKSTART_HELD_OUT", "/usr/include/nlohmann/detail/meta"}};
    process.timeout_seconds = 240;
    return process;
  }
  std::string run_to_the_end() {
    const support::ProcessResult result = support::run(script());
    EXPECT_EQ(result.exit_code, 0) << result.output;
    return result.output;
  }

  TemporaryFolder folder_;
  const fs::path data_ = folder_.path() / "prepared", run_ = folder_.path() / "run";
};

void expect_keys(const nlohmann::json& object, std::initializer_list<const char*> keys) {
  for (const char* key : keys) EXPECT_TRUE(object.contains(key)) << key;
}

void expect_report(const fs::path& run) {
  const auto report = nlohmann::json::parse(read_text(run / "report.json"));
  expect_keys(report, {"checkpoint", "device", "validation_perplexity", "validation_bits_per_byte", "anchors",
                       "baseline", "results"});
  expect_keys(report["baseline"], {"tokens_per_second", "ms_per_token"});
  EXPECT_EQ(report["step"], 60);
  EXPECT_GT(report["validation_bits_per_byte"], 0.5);
  EXPECT_LT(report["validation_bits_per_byte"], 8.0);
  std::vector<std::string> anchors;
  for (const auto& anchor : report["anchors"]) anchors.push_back(anchor["model"]);
  EXPECT_EQ(anchors, (std::vector<std::string>{"unigram", "order 2", "order 3", "order 5"}));
  std::map<std::string, int> drafters;
  for (const auto& row : report["results"]) {
    expect_keys(row, {"drafter", "shape", "acceptance", "temperature", "batch", "tokens_per_second",
                      "tokens_per_second_spread", "speedup", "mean_accepted_length", "acceptance_by_position",
                      "time_ms", "time_to_first_token_ms", "distinct_4", "identical_to_baseline",
                      "predicted_speedup"});
    expect_keys(row["time_ms"], {"draft", "verify", "sample", "commit"});
    ++drafters[row["drafter"]];
    EXPECT_EQ(row["identical_to_baseline"], row["acceptance"] == "greedy" ? nlohmann::json(true) : nullptr)
        << row;
  }
  EXPECT_EQ(drafters, (std::map<std::string, int>{
                          {"none", 2}, {"medusa", 3}, {"medusa_tree", 3}, {"mtp", 3}, {"ngram", 3}}));
  const std::string page = read_text(run / "report.html");
  for (const char* part : {"<svg", "medusa_tree", "bits per byte"})
    EXPECT_NE(page.find(part), std::string::npos) << part;
  for (const char* outside : {"src=\"http", "href=\"http", "<link"})
    EXPECT_EQ(page.find(outside), std::string::npos) << "the page needs other files: " << outside;
}

// mpirun and its ranks are killed once there is a checkpoint; the script fails, and run again it goes on.
void kill_in_training(const support::Process& script, const fs::path& run) {
  support::Running first(script);
  for (int i = 0; i < 30000 && !fs::exists(run / "checkpoints" / "latest"); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  ASSERT_TRUE(fs::exists(run / "checkpoints" / "latest"));
  const std::vector<int> processes = support::descendants(first.pid());
  EXPECT_GE(processes.size(), 3u) << "mpirun and two ranks";
  for (int pid : processes) kill(pid, SIGKILL);
  const support::ProcessResult result = first.wait();
  EXPECT_NE(result.exit_code, 0) << result.output;
  EXPECT_FALSE(result.timed_out);
  EXPECT_EQ(result.output.find("evaluating"), std::string::npos) << result.output;
}

TEST_F(Quickstart, KilledItGoesOnAndFinishedItSkips) {
  ASSERT_NO_FATAL_FAILURE(kill_in_training(script(), run_));
  const std::string second = run_to_the_end();
  EXPECT_NE(second.find(data_.string() + " is there"), std::string::npos) << second;
  EXPECT_NE(second.find("going on from " + (run_ / "checkpoints").string()), std::string::npos) << second;
  EXPECT_NE(second.find("step 60/60"), std::string::npos) << second;
  EXPECT_NE(second.find("open " + (run_ / "report.html").string()), std::string::npos) << second;
  EXPECT_EQ(support::metric(run_, "loss").size(), 60u);
  expect_report(run_);

  const auto written = fs::last_write_time(run_ / "report.html");
  const std::string third = run_to_the_end();
  EXPECT_NE(third.find(run_.string() + " is finished"), std::string::npos) << third;
  EXPECT_NE(third.find("it keeps the settings it was trained with"), std::string::npos) << third;
  EXPECT_EQ(third.find("step 60/60"), std::string::npos) << third;
  EXPECT_EQ(fs::last_write_time(run_ / "report.html"), written);

  // Without its report a run is evaluated again, and only that.
  fs::remove(run_ / "report.html");
  const std::string fourth = run_to_the_end();
  EXPECT_NE(fourth.find(run_.string() + " is finished"), std::string::npos) << fourth;
  EXPECT_TRUE(fs::exists(run_ / "report.html"));
}

TEST_F(Quickstart, AWrongArgumentIsNamed) {
  support::Process process = script();
  process.arguments.push_back("--steps");
  const support::ProcessResult result = support::run(process);
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_EQ(result.output, "quickstart: '--steps' is not section.key=value\n");
  EXPECT_TRUE(fs::is_empty(folder_.path()));
}

}  // namespace
}  // namespace launch

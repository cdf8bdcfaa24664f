// Whole jobs as a user starts them: what they leave behind when they end, are stopped, or are given damaged
// files.
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <set>
#include <thread>

#include "data/dataset.h"
#include "tests/launch/job_fixture.h"

namespace launch {
namespace {

// Flips one bit in the middle of a file.
void damage(const fs::path& file) {
  std::string bytes = read_text(file);
  ASSERT_FALSE(bytes.empty());
  bytes[bytes.size() / 2] ^= 1;
  write_text(file, bytes);
}

TEST_F(Job, RunsLeaveTheirStatusAndASecondOneIsRefused) {
  prepare();
  const Outcome first = foretell_ranks(2, train());
  ASSERT_EQ(first.exit_code, 0) << first.errors;
  EXPECT_NE(first.output.find("foretell evaluate " + run().string()), std::string::npos) << first.output;
  EXPECT_EQ(status()["state"], "finished");
  EXPECT_EQ(status()["step"], 6);
  const std::string log = read_text(run() / "metrics.jsonl");
  expect_one_line(foretell_ranks(2, train()), 2, "--resume auto");
  expect_one_line(foretell(train()), 2, "--resume auto");
  EXPECT_EQ(read_text(run() / "metrics.jsonl"), log);
  EXPECT_EQ(status()["state"], "finished");
  EXPECT_EQ(foretell("inspect " + run().string() + " --verify").exit_code, 0);
}

class EvaluatedJob : public Job {
 protected:
  // As it is left when a disk was full, or by another program.
  void inspect_with_a_damaged_report() {
    const fs::path report = run() / "report.json", whole = run() / "whole.json";
    fs::rename(report, whole);
    nlohmann::json json = nlohmann::json::parse(read_text(whole));
    json["results"][0]["tokens_per_second_spread"] = nlohmann::json::array();
    for (const std::string& text : {std::string(), read_text(whole).substr(0, 100), json.dump()}) {
      write_text(report, text);
      expect_one_line(foretell("inspect " + run().string()), 74, "report.json");
    }
    fs::remove(report);
    fs::create_directory(report);
    expect_one_line(foretell("inspect " + run().string()), 74, "report.json: ");
    fs::remove(report);
    fs::rename(whole, report);
    write_text(run() / "status.json", "{");
    const Outcome inspected = foretell("inspect " + run().string());
    EXPECT_EQ(inspected.exit_code, 0) << inspected.errors;
    EXPECT_NE(inspected.output.find("status.json is damaged"), std::string::npos) << inspected.output;
  }
};

TEST_F(EvaluatedJob, EvaluateInspectAndGenerate) {
  prepare();
  config_.decode.prompts = 1;
  config_.decode.prompt_tokens = 8;
  config_.decode.max_tokens = 12;
  config_.decode.repeats = 1;
  config_.decode.drafters = "medusa";
  config_.decode.acceptance = "greedy";
  config_.decode.temperature = "0";
  save();
  ASSERT_EQ(foretell(train()).exit_code, 0);
  EXPECT_NE(read_text(run() / "samples.txt").find("step 6"), std::string::npos);
  const Outcome evaluated = foretell("evaluate " + run().string());
  ASSERT_EQ(evaluated.exit_code, 0) << evaluated.errors;
  EXPECT_NE(evaluated.output.find("report: " + (run() / "report.html").string()), std::string::npos);
  EXPECT_TRUE(fs::exists(run() / "report.html"));
  EXPECT_TRUE(nlohmann::json::parse(read_text(run() / "report.json")).contains("results"));
  expect_one_line(foretell("evaluate " + run().string() + " --output " + file_), 74, "is not a folder");
  inspect_with_a_damaged_report();
  const std::string generate = "generate " + run().string() + " --prompt int --max-tokens 9 ";
  const Outcome plain = foretell(generate);
  ASSERT_EQ(plain.exit_code, 0) << plain.errors;
  EXPECT_EQ(plain.output.rfind("int", 0), 0u) << plain.output;
  EXPECT_NE(plain.output.find("\n\n9 tokens; after the first, 8 steps: 1.00 tokens a step, "),
            std::string::npos)
      << plain.output;
  EXPECT_NE(plain.output.find("tokens per second"), std::string::npos) << plain.output;
  const Outcome one = foretell("generate " + run().string() + " --prompt int --max-tokens 1");
  EXPECT_EQ(one.output.substr(one.output.rfind("\n\n")), "\n\n1 token\n") << "no step, no speed";
  // The same text from a drafter; only the last line, of speeds, differs.
  const Outcome drafted = foretell(generate + "--drafter medusa");
  const auto text = [](const std::string& output) { return output.substr(0, output.rfind("\n\n")); };
  EXPECT_EQ(text(drafted.output), text(plain.output));
}

TEST_F(Job, AnEvaluationNeedsTextForValidation) {
  support::write_tiny_text(folder_.path() / "text");
  config_.data.path = (folder_.path() / "unsplit").string();
  save();
  ASSERT_EQ(foretell("prepare --tokenizer bytes --val-fraction 0 --input " +
                     (folder_.path() / "text").string() + " --output " + config_.data.path)
                .exit_code,
            0);
  const Outcome trained = foretell(train());
  ASSERT_EQ(trained.exit_code, 0) << trained.errors;
  expect_one_line(foretell("evaluate " + run().string()), 74,
                  config_.data.path + " holds no text for validation");
}

// Lines of metrics that are JSON, but none of this program's.
TEST_F(Job, ForeignLinesOfMetricsAreLeftOut) {
  prepare();
  ASSERT_EQ(foretell(train()).exit_code, 0);
  std::ofstream(run() / "metrics.jsonl", std::ios::app)
      << "{\"step\": \"seven\"}\n{\"step\": 2.5}\n[7]\n{\"step\"";
  const Outcome inspected = foretell("inspect " + run().string());
  EXPECT_EQ(inspected.exit_code, 0) << inspected.errors;
  EXPECT_NE(inspected.output.find("last logged step 5"), std::string::npos) << inspected.output;
  const Outcome resumed = foretell(train("--resume auto --set train.steps=8"));
  EXPECT_EQ(resumed.exit_code, 0) << resumed.errors;
  EXPECT_EQ(read_text(run() / "metrics.jsonl").find("seven"), std::string::npos);
}

TEST_F(Job, Usr1SavesAndStopsAndResumeGoesOn) {
  prepare();
  config_.train.steps = 100000;
  config_.checkpoint.every = 0;
  save();
  support::Process process = support::ranks_process(2, {FORETELL_BINARY, "train", file_});
  support::Running job(process);
  for (int i = 0; i < 600 && !fs::exists(run() / "status.json"); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  ASSERT_EQ(status()["state"], "running");
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  kill(job.pid(), SIGUSR1);
  const support::ProcessResult stopped = job.wait();
  EXPECT_EQ(stopped.exit_code, 75) << stopped.output;
  EXPECT_EQ(status()["state"], "stopped");
  EXPECT_EQ(status()["exit_code"], 75);
  const int64_t step = status()["step"];
  EXPECT_GT(step, 0);
  const Outcome resumed =
      foretell_ranks(2, train("--resume auto --set train.steps=" + std::to_string(step + 2)));
  EXPECT_EQ(resumed.exit_code, 0) << resumed.errors;
  EXPECT_EQ(status()["state"], "finished");
  EXPECT_EQ(status()["step"], step + 2);
}

TEST_F(Job, DryRunPrintsAPlanAndWritesNothing) {
  prepare();
  const Outcome outcome = foretell_ranks(2, train("--dry-run"));
  EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_NE(outcome.output.find("ranks                   2"), std::string::npos) << outcome.output;
  EXPECT_FALSE(fs::exists(run()));
  const Outcome plan = foretell("plan " + file_ + " --ranks 3");
  EXPECT_EQ(plan.exit_code, 0) << plan.errors;
  EXPECT_NE(plan.output.find("ranks                   3"), std::string::npos) << plan.output;
}

TEST_F(Job, MissingDataLeavesNothingBehind) {
  config_.data.path = (folder_.path() / "nothing").string();
  save();
  expect_one_line(foretell(train()), 74, "nothing");
  expect_one_line(foretell_ranks(2, train()), 74, "nothing");
  EXPECT_FALSE(fs::exists(run()));
}

TEST_F(Job, DamagedShards) {
  prepare();
  damage(any_file(config_.data.path, ".h5"));
  expect_one_line(foretell(train()), 74, ".h5");
  expect_one_line(foretell_ranks(2, train()), 74, ".h5");
  EXPECT_FALSE(fs::exists(run()));
  expect_one_line(foretell("inspect --verify " + config_.data.path), 74, ".h5");
  fs::resize_file(any_file(config_.data.path, ".h5"), 100);
  expect_one_line(foretell(train()), 74, ".h5");
}

TEST_F(Job, MoreRanksThanSamples) {
  const std::string text =
      write_text(folder_.path() / "one" / "a.txt", "a single short document of a few words");
  const std::string data = (folder_.path() / "small").string();
  const Outcome prepared = foretell("prepare --tokenizer bytes --input " + text + " --output " + data);
  ASSERT_EQ(prepared.exit_code, 0) << prepared.errors;
  expect_one_line(foretell_ranks(2, train("--set data.path=" + data)), 2, "fewer ranks");
  EXPECT_FALSE(fs::exists(run()));
}

// What is said behind a warning for each checkpoint that is passed over.
Outcome behind_warnings(Outcome outcome, int checkpoints) {
  std::istringstream lines(outcome.errors);
  std::string line;
  for (int i = 0; i < checkpoints; ++i) {
    std::getline(lines, line);
    EXPECT_EQ(line.rfind("warning: checkpoint ", 0), 0u) << outcome.errors;
  }
  outcome.errors = {std::istreambuf_iterator<char>(lines), {}};
  return outcome;
}

TEST_F(Job, DamagedCheckpoints) {
  prepare();
  ASSERT_EQ(foretell(train()).exit_code, 0);
  damage(any_file(run() / "checkpoints" / "step_00000006", ".h5"));
  const Outcome older = behind_warnings(foretell("generate --prompt a " + run().string()), 1);
  EXPECT_EQ(older.exit_code, 0) << older.errors;
  EXPECT_EQ(older.errors.find("warning"), std::string::npos) << older.errors;
  const std::string new_run = " --set log.run=" + (folder_.path() / "new").string();
  EXPECT_EQ(behind_warnings(foretell_ranks(2, train(new_run + " --set train.init_from=" + run().string())), 1)
                .exit_code,
            0);
  damage(any_file(run() / "checkpoints" / "step_00000003", ".h5"));
  expect_one_line(foretell("inspect --verify " + run().string()), 74, "step_");
  expect_one_line(behind_warnings(foretell("evaluate " + run().string()), 2), 74, "verifies");
  expect_one_line(behind_warnings(foretell("generate --prompt a " + run().string()), 2), 74, "verifies");
}

TEST_F(Job, CheckpointsOfAnotherArchitectureOrTokenizer) {
  prepare();
  ASSERT_EQ(foretell(train()).exit_code, 0);
  const std::string log = read_text(run() / "metrics.jsonl");
  const std::string other = (folder_.path() / "other").string(), on_other = " --set data.path=" + other + " ",
                    to_new = " --set log.run=" + (folder_.path() / "new").string() + " ",
                    from_run = " --set train.init_from=" + run().string() + " ";
  ASSERT_EQ(foretell("prepare --tokenizer sentencepiece:300 --input " + (folder_.path() / "text").string() +
                     " --output " + other)
                .exit_code,
            0);
  expect_one_line(foretell_ranks(2, train("--resume auto --set train.steps=8 --set model.ffn_width=96")), 74,
                  "was trained with model.ffn_width = 64");
  expect_one_line(foretell_ranks(2, train("--resume auto --set train.steps=8" + on_other)), 74,
                  "another tokenizer");
  expect_one_line(foretell_ranks(2, train(to_new + from_run + "--set model.width=64")), 74, "set it to 32");
  expect_one_line(foretell_ranks(2, train(to_new + from_run + on_other)), 74, "tokenizer");
  expect_one_line(foretell("evaluate " + run().string() + on_other), 74, "another tokenizer");
  EXPECT_EQ(read_text(run() / "metrics.jsonl"), log);
  EXPECT_EQ(status()["state"], "finished");
  EXPECT_FALSE(fs::exists(run() / "report.json"));
  EXPECT_FALSE(fs::exists(folder_.path() / "new"));
}

TEST_F(Job, ResumeWithEveryCheckpointTruncated) {
  prepare();
  ASSERT_EQ(foretell(train()).exit_code, 0);
  int checkpoints = 0;
  for (const auto& step : fs::directory_iterator(run() / "checkpoints"))
    if (step.is_directory() && ++checkpoints) fs::resize_file(any_file(step, ".h5"), 100);
  const Outcome outcome = foretell_ranks(2, train("--resume auto --set train.steps=8"));
  expect_one_line(behind_warnings(outcome, checkpoints), 74, "or move the folder away to start from step 0");
}

TEST_F(Job, NoSpaceForPreparedData) {
  support::write_tiny_text(folder_.path() / "text");
  const fs::path out = folder_.path() / "out";
  for (const char* call : {"1", "5"}) {
    expect_one_line(run_shell("env LD_PRELOAD=" FAULT_SHIM
                              " ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 FAULT_BELOW=" +
                              (folder_.path() / ".out").string() + " FULL_AT=" + call +
                              " " FORETELL_BINARY " prepare --tokenizer bytes --input " +
                              (folder_.path() / "text").string() + " --output " + out.string()),
                    74, "No space left on device; free some space");
    for (const auto& entry : fs::directory_iterator(folder_.path()))
      EXPECT_EQ(entry.path().filename().string().find("out"), std::string::npos) << entry.path();
  }
}

// Killed at any call: the old data or the new, and nothing else once it was done again.
TEST_F(Job, OverwritingPreparedDataLosesNeither) {
  const fs::path root = folder_.path() / "data", out = root / "out", text = folder_.path() / "more";
  const auto prepare_again = [&](const std::string& environment) {
    return run_shell("env " + environment + " ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 " +
                     FORETELL_BINARY " prepare --overwrite --tokenizer bytes --input " + text.string() +
                     " --output " + out.string());
  };
  const auto tokens = [&] { return data::TokenDataset(out, "train", 8).tokens(); };
  support::write_tiny_text(text);
  ASSERT_EQ(prepare_again("A=B").exit_code, 0);
  const int64_t older = tokens();
  fs::copy(out, folder_.path() / "older", fs::copy_options::recursive);
  std::ofstream(text / "new.txt") << std::string(5000, 'x') << "\n";
  const std::string shim = "LD_PRELOAD=" FAULT_SHIM " FAULT_BELOW=" + root.string() + " KILL_AT=";
  const Outcome whole = prepare_again(shim + "0");
  ASSERT_EQ(whole.exit_code, 0) << whole.errors;
  const int64_t newer = tokens();
  ASSERT_NE(older, newer);
  long calls = 0;
  ASSERT_EQ(std::sscanf(whole.errors.c_str() + whole.errors.rfind("calls"), "calls %ld", &calls), 1);
  std::set<int64_t> seen;
  for (long call = 1; call <= calls; ++call) {
    fs::remove_all(out);
    fs::copy(folder_.path() / "older", out, fs::copy_options::recursive);
    EXPECT_EQ(prepare_again(shim + std::to_string(call)).exit_code, 137) << call;
    ASSERT_TRUE(fs::exists(out)) << "killed at call " << call << " of " << calls;
    seen.insert(tokens());
  }
  EXPECT_EQ(seen, (std::set<int64_t>{older, newer}));
  ASSERT_EQ(prepare_again("A=B").exit_code, 0);
  EXPECT_EQ(tokens(), newer);
  EXPECT_EQ(std::distance(fs::directory_iterator(root), fs::directory_iterator()), 1);
}

// Without the right to read everything that root has.
Outcome foretell_with_permissions(const std::string& arguments) {
  const std::string prefix = geteuid() == 0 ? "setpriv --bounding-set=-dac_override,-dac_read_search " : "";
  return run_shell(prefix + FORETELL_BINARY " " + arguments);
}

TEST_F(Job, FilesThatMayNotBeRead) {
  prepare();
  ASSERT_EQ(foretell(train()).exit_code, 0);
  const auto forbid = [](const fs::path& path) { fs::permissions(path, fs::perms::none); };
  const std::string text = write_text(folder_.path() / "secret" / "a.txt", "a text");
  forbid(text);
  const std::string out = (folder_.path() / "out").string();
  expect_one_line(foretell_with_permissions("prepare --tokenizer bytes --input " + text + " --output " + out),
                  74, text + ": cannot open: Permission denied; check its permissions");
  EXPECT_FALSE(fs::exists(out));
  const fs::path closed = folder_.path() / "texts" / "closed";
  write_text(closed / "b.txt", "not to be read");
  write_text(folder_.path() / "texts" / "a.txt", "a longer text\nto be read\n");
  for (const fs::perms perms : {fs::perms::none, fs::perms::owner_read, fs::perms::owner_exec}) {
    fs::permissions(closed, perms);
    const Outcome rest = foretell_with_permissions("prepare --tokenizer bytes --input " +
                                                   closed.parent_path().string() + " --output " + out);
    EXPECT_EQ(rest.exit_code, 0) << rest.errors;
    EXPECT_NE(rest.output.find(closed.string() + ": cannot open: Permission denied; check its permissions"),
              std::string::npos)
        << rest.output;
    fs::permissions(closed, fs::perms::owner_all);
    fs::remove_all(out);
  }
  const fs::path locked = folder_.path() / "locked";
  fs::create_directory(locked);
  for (const fs::perms perms : {fs::perms::none, fs::perms::owner_read | fs::perms::owner_exec}) {
    fs::permissions(locked, perms);
    expect_one_line(foretell_with_permissions(train("--set log.run=" + (locked / "run").string())), 74,
                    "check its permissions");
  }
  expect_one_line(
      foretell_with_permissions("evaluate " + run().string() + " --output " + (locked / "report").string()),
      74, locked.string() + ": Permission denied");
  const fs::path shard = any_file(config_.data.path, ".h5");
  forbid(shard);
  expect_one_line(foretell_with_permissions(train("--set log.run=" + out)), 74,
                  shard.string() + ": cannot open: Permission denied");
  fs::permissions(shard, fs::perms::owner_all);
  forbid(file_);
  expect_one_line(foretell_with_permissions(train()), 2, "cannot read the configuration file");
  // The newest may be as good as ever.
  const fs::path newest = run() / "checkpoints" / "step_00000006", manifest = newest / "manifest.json";
  ASSERT_TRUE(fs::exists(manifest));
  fs::permissions(file_, fs::perms::owner_all);
  forbid(manifest);
  for (const std::string& command : {train("--resume auto"), "generate --prompt a " + run().string()})
    expect_one_line(foretell_with_permissions(command), 74,
                    manifest.string() + ": Permission denied; check its permissions; " + newest.string() +
                        " may be good: make it readable, or move it away");
  EXPECT_TRUE(fs::exists(newest));
  fs::permissions(manifest, fs::perms::owner_all);
  const fs::path metrics = run() / "metrics.jsonl";
  forbid(metrics);
  expect_one_line(foretell_with_permissions(train("--resume auto --set train.steps=8")), 74,
                  metrics.string() + ": cannot open: Permission denied");
  fs::permissions(metrics, fs::perms::owner_all);
  EXPECT_EQ(support::metric(run(), "loss").size(), 6u) << "nothing is lost";
  forbid(run() / "checkpoints");
  expect_one_line(foretell_with_permissions("generate --prompt a " + run().string()), 74,
                  "Permission denied; check its permissions");
  fs::permissions(run() / "checkpoints", fs::perms::owner_all);
  fs::permissions(locked, fs::perms::owner_all);
}

TEST_F(Job, PrepareRefusesWhatItCannotUse) {
  const std::string out = (folder_.path() / "out").string();
  const auto prepare_from = [&](const std::string& input) {
    return foretell("prepare --tokenizer bytes --input " + input + " --output " + out);
  };
  expect_one_line(prepare_from("/nowhere/at/all"), 74, "/nowhere/at/all");
  fs::create_directories(folder_.path() / "empty");
  expect_one_line(prepare_from((folder_.path() / "empty").string()), 74, "no usable text");
  write_text(folder_.path() / "binary" / "a.txt", std::string("\0\1\2\377\0", 5));
  expect_one_line(prepare_from((folder_.path() / "binary").string()), 74, "1 skipped");
  EXPECT_FALSE(fs::exists(out));
  write_text(folder_.path() / "binary" / "b.txt", "some good text in a file\n");
  const Outcome mixed = prepare_from((folder_.path() / "binary").string());
  EXPECT_EQ(mixed.exit_code, 0) << mixed.errors;
  EXPECT_NE(mixed.output.find("1 files skipped"), std::string::npos) << mixed.output;
  EXPECT_NE(mixed.output.find("a.txt"), std::string::npos) << mixed.output;
}

}  // namespace
}  // namespace launch

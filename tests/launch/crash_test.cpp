// Jobs that are killed outright, at any moment, or of which one rank no longer answers: nothing keeps
// running, and going on ends with the same bits as a job that was left alone.
#include <fmt/format.h>
#include <signal.h>

#include <chrono>
#include <functional>
#include <thread>

#include "checkpoints/checkpoint.h"
#include "kernels/core/device.h"
#include "tests/launch/job_fixture.h"

namespace launch {
namespace {

using support::stored_state;

bool soon(const std::function<bool()>& condition) {
  for (int i = 0; i < 30000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return false;
}

// /proc lists a process that has ended until its parent has asked for its exit code.
bool running(int pid) {
  std::ifstream in("/proc/" + std::to_string(pid) + "/stat");
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  return !text.empty() && text[text.rfind(')') + 2] != 'Z';
}

class Crash : public Job {
 protected:
  Crash() {
    config_.train.steps = 6;
    config_.log.run = (folder_.path() / "whole").string();
    save();
    prepare();
  }

  // The job left alone, and from here on the job to be killed.
  void run_whole() {
    ASSERT_EQ(foretell_ranks(2, train()).exit_code, 0);
    whole_ = run();
    config_.log.run = (folder_.path() / "run").string();
    save();
  }
  // Two ranks, the first of them with `faults` of the shim below its checkpoints.
  Outcome train_with_faults(const std::string& faults) {
    const std::string train_it = FORETELL_BINARY " " + train("--resume auto ");
    return run_shell("source " FORETELL_SOURCE "/launch/mpi_env.sh; mpirun -np 1 env LD_PRELOAD=" FAULT_SHIM
                     " ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 FAULT_BELOW=" +
                     (run() / "checkpoints").string() + " " + faults + " " + train_it + " : -np 1 " +
                     train_it);
  }
  // How many calls the first rank makes in `checkpoints`; the job runs to its end and is removed.
  long count_calls() {
    const Outcome counted = train_with_faults("KILL_AT=0");
    EXPECT_EQ(counted.exit_code, 0) << counted.errors;
    long calls = 0;
    EXPECT_EQ(std::sscanf(counted.errors.c_str(), "calls %ld", &calls), 1) << counted.errors;
    fs::remove_all(run());
    return calls;
  }
  // So many that a signal behind the first checkpoint comes before the last step: on a busy machine, and
  // where the disk is slow, too, since the third checkpoint waits for the first.
  void many_steps() {
    config_.train.steps = 400;
    config_.checkpoint.every = 150;
    save();
  }
  // What the job says and how it ends when rank `rank` gets `signal` behind the first checkpoint.
  support::ProcessResult signal_rank(const std::string& rank, int signal) {
    support::Running job(support::ranks_process(2, {FORETELL_BINARY, "train", file_}));
    EXPECT_TRUE(soon([&] { return fs::exists(run() / "checkpoints" / "latest"); }));
    const std::vector<int> processes = support::descendants(job.pid());
    int reached = 0;
    for (int pid : processes)
      if (support::environment_of(pid, "OMPI_COMM_WORLD_RANK") == rank) reached += kill(pid, signal) == 0;
    EXPECT_EQ(reached, 1);
    const support::ProcessResult result = job.wait();
    EXPECT_EQ(result.output.find("-----"), std::string::npos) << "a banner: " << result.output;
    for (int pid : processes) EXPECT_TRUE(soon([&] { return !running(pid); })) << pid << " hangs";
    EXPECT_LT(support::metric(run(), "loss").size(), static_cast<size_t>(config_.train.steps));
    return result;
  }
  static void expect_killed(const support::ProcessResult& result) {
    EXPECT_EQ(result.exit_code, 137) << result.output;
  }
  static void expect_given_up(const support::ProcessResult& result, const std::string& who) {
    EXPECT_FALSE(result.timed_out) << result.output;
    EXPECT_EQ(result.exit_code, 70) << result.output;
    EXPECT_NE(result.output.find(who), std::string::npos) << result.output;
    EXPECT_NE(result.output.find("--resume auto"), std::string::npos) << result.output;
  }
  void goes_on_to_the_same_end() {
    const Outcome resumed = foretell_ranks(2, train("--resume auto"));
    ASSERT_EQ(resumed.exit_code, 0) << resumed.errors;
    EXPECT_NE(resumed.output.find("going on from"), std::string::npos) << resumed.output;
    EXPECT_EQ(status()["state"], "finished");
    EXPECT_EQ(support::metric(run(), "loss"), support::metric(whole_, "loss"));
    EXPECT_TRUE(stored_state(run()) == stored_state(whole_));
    // A job that was killed after its last checkpoint saves no more: it makes no sample and clears nothing
    // away.
    const bool saved = resumed.output.find("saved ") != std::string::npos;
    const std::string sample = fmt::format("==== step {}:", config_.train.steps);
    EXPECT_TRUE(!saved || read_text(run() / "samples.txt").find(sample) != std::string::npos);
    for (const auto& entry : fs::directory_iterator(run() / "checkpoints"))
      EXPECT_FALSE(saved && entry.path().filename().string().starts_with(".tmp")) << entry.path();
  }

  fs::path whole_;
};

TEST_F(Crash, AKilledRankEndsTheJobAndItGoesOn) {
  many_steps();
  run_whole();
  for (const char* rank : {"0", "1"}) {
    expect_killed(signal_rank(rank, SIGKILL));
    goes_on_to_the_same_end();
    fs::remove_all(run());
  }
}

TEST_F(Crash, ARankThatHangsEndsTheJobAndItGoesOn) {
  many_steps();
  run_whole();
  const int64_t usual = config_.comm.deadline_seconds;
  config_.comm.deadline_seconds = 20;  // a slow disk holds the other rank for seconds, too
  save();
  expect_given_up(signal_rank("1", SIGSTOP), "waiting for rank 1");
  config_.comm.deadline_seconds = usual;
  save();
  goes_on_to_the_same_end();
}

// The same on two GPUs: steps are recorded graphs with NCCL's exchanges in them.
class CudaCrash : public Crash {
 protected:
  void SetUp() override {
    if (kernels::cuda_device_count() < 2) GTEST_SKIP() << "needs two GPUs";
    config_.train.device = "cuda";
    config_.train.steps = 4000;
    config_.checkpoint.every = 500;
    config_.comm.deadline_seconds = 20;
    save();
    run_whole();
  }
};

TEST_F(CudaCrash, AKilledRankEndsTheJobAndItGoesOn) {
  expect_killed(signal_rank("1", SIGKILL));
  goes_on_to_the_same_end();
}

TEST_F(CudaCrash, ARankThatHangsEndsTheJobAndItGoesOn) {
  expect_given_up(signal_rank("1", SIGSTOP), "rank 0 on cuda:0");
  goes_on_to_the_same_end();
}

// Two checkpoints are written, at steps 3 and 6; the kill comes while the second one is.
TEST_F(Crash, AKillWhileACheckpointIsWritten) {
  run_whole();
  const long calls = count_calls();
  ASSERT_GT(calls, 40);
  for (const long at : {calls * 55 / 100, calls * 8 / 10, calls - 1}) {
    const Outcome killed = train_with_faults("KILL_TORN=1 KILL_AT=" + std::to_string(at));
    EXPECT_EQ(killed.exit_code, 137) << killed.errors;
    EXPECT_NE(status()["state"], "finished");
    goes_on_to_the_same_end();
    fs::remove_all(run());
  }
}

TEST_F(Crash, NoSpaceForTheLastCheckpoint) {
  run_whole();
  const long half = count_calls() / 2;
  const Outcome full = train_with_faults("FULL_AT=" + std::to_string(half + half / 4));
  expect_one_line(full, 74, "the checkpoint could not be saved");
  EXPECT_NE(full.errors.find("free space and run again with --resume auto"), std::string::npos)
      << full.errors;
  EXPECT_EQ(status()["state"], "failed");
  EXPECT_EQ(status()["exit_code"], 74);
  EXPECT_EQ(checkpoints::resolve(run(), {}).filename(), "step_00000003");
  goes_on_to_the_same_end();
}

// Wherever it happens, also when all but the manifest is written: saves on the way are warnings.
TEST_F(Crash, NoSpaceForACheckpointOnTheWay) {
  run_whole();
  const long half = count_calls() / 2;
  for (long at = half - 8; at <= half; ++at) {
    SCOPED_TRACE(at);
    fs::remove_all(run());
    const Outcome full = train_with_faults("FULL_AT=" + std::to_string(at));
    EXPECT_EQ(full.exit_code, 74) << full.errors;
    EXPECT_NE(full.errors.find("run again with --resume auto"), std::string::npos) << full.errors;
  }
}

}  // namespace
}  // namespace launch

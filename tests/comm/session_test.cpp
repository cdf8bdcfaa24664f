#include <dlfcn.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <fstream>
#include <thread>

#include "comm/communicator.h"
#include "tests/support/process.h"

namespace {

// Far below the deadline of these scenarios (300 s): the job must end because a rank failed, not because the
// others ran out of time.
constexpr double kPatience = 50;

support::ProcessResult play(const std::string& scenario) {
  return support::run_ranks(3, {FAILING_RANKS, scenario}, kPatience);
}

TEST(Session, AnErrorOnOneRankEndsTheJobWithItsExitCode) {
  const auto result = play("error");
  EXPECT_EQ(result.exit_code, 74) << result.output;
  EXPECT_EQ(result.output, "the file is gone\n");  // no banner of mpirun around it
}

TEST(Session, ACrashOfOneRankEndsTheJob) {
  const auto result = play("crash");
  EXPECT_FALSE(result.timed_out);
  EXPECT_EQ(result.exit_code, 9) << result.output;
}

TEST(Session, TheDeadlineNamesTheOperationAndTheLateRank) {
  const auto result = play("late");
  EXPECT_EQ(result.exit_code, 70) << result.output;
  EXPECT_NE(result.output.find("all_reduce of fp32 (5000)"), std::string::npos) << result.output;
  EXPECT_NE(result.output.find("within 1 s"), std::string::npos) << result.output;
  EXPECT_NE(result.output.find("waiting for rank 1"), std::string::npos) << result.output;
}

TEST(Session, RanksThatRunDifferentOperationsAreTold) {
  for (const char* scenario : {"different", "sizes", "skipped"}) {
    const auto result = play(scenario);
    EXPECT_FALSE(result.timed_out) << scenario;
    EXPECT_EQ(result.exit_code, 1) << scenario << ": " << result.output;
    EXPECT_NE(result.output.find("another operation"), std::string::npos)
        << scenario << ": " << result.output;
  }
}

TEST(Session, DestroyedByAnExceptionItEndsTheJob) {
  EXPECT_EQ(play("unwound error").exit_code, 1);
  EXPECT_EQ(play("unwound late").exit_code, 70);
}

TEST(Session, RanksDieWithTheirLauncher) {
  namespace fs = std::filesystem;
  std::string folder = (fs::temp_directory_path() / "foretell_ranks_XXXXXX").string();
  ASSERT_NE(::mkdtemp(folder.data()), nullptr);
  std::vector<pid_t> ranks;
  {
    support::Running job(support::ranks_process(2, {FAILING_RANKS, "orphans", folder}));
    for (int rank = 0; rank < 2; ++rank) {
      const fs::path file = fs::path(folder) / std::to_string(rank);
      for (int i = 0; i < 3000 && !fs::exists(file); ++i)
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      std::ifstream(file) >> ranks.emplace_back();
    }
  }  // SIGKILL to mpirun
  for (pid_t rank : ranks) {
    ASSERT_GT(rank, 0);
    bool gone = false;
    for (int i = 0; i < 1000 && !gone; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      // A killed process stays as a zombie until somebody has waited for it.
      std::string pid, name, state;
      std::ifstream("/proc/" + std::to_string(rank) + "/stat") >> pid >> name >> state;
      gone = state.empty() || state == "Z" || state == "X";
    }
    EXPECT_TRUE(gone) << rank;
  }
  fs::remove_all(folder);
}

TEST(Session, WithoutALauncherMpiIsNeverTouched) {
  int argc = 0;
  char** argv = nullptr;
  comm::Session session(&argc, &argv);
  EXPECT_EQ(session.world().size(), 1);
  EXPECT_EQ(session.local_size(), 1);
  EXPECT_EQ(session.world().broadcast("x", 0), "x");
  auto* initialized = reinterpret_cast<int (*)(int*)>(::dlsym(RTLD_DEFAULT, "MPI_Initialized"));
  ASSERT_NE(initialized, nullptr);
  int flag = -1;
  initialized(&flag);
  EXPECT_EQ(flag, 0);
}

TEST(Session, TasksOfSrunThatCannotFindEachOtherAreRefused) {
  ::setenv("SLURM_PROCID", "0", 1);
  ::setenv("SLURM_STEP_NUM_TASKS", "2", 1);
  EXPECT_THROW(comm::Session(nullptr, nullptr), kernels::ConfigError);
  ::setenv("SLURM_STEP_NUM_TASKS", "1", 1);
  EXPECT_EQ(comm::Session(nullptr, nullptr).world().size(), 1);
  ::unsetenv("SLURM_PROCID");
  ::unsetenv("SLURM_STEP_NUM_TASKS");
}

}  // namespace

#include <gtest/gtest.h>

#include <algorithm>

#include "kernels/core/device.h"
#include "tests/support/process.h"

namespace {

// Runs a scenario on as many GPUs as ranks; false (and the test is skipped) where there are fewer.
class CudaNccl : public testing::Test {
 protected:
  static bool enough_for(int ranks) { return kernels::cuda_device_count() >= ranks; }
  static support::ProcessResult play(int ranks, const std::string& scenario) {
    return support::run_ranks(ranks, {NCCL_RANKS, scenario}, 120);
  }
  static void expect_one_line_and_70(const support::ProcessResult& result, const std::string& says) {
    EXPECT_FALSE(result.timed_out) << result.output;
    EXPECT_EQ(result.exit_code, 70) << result.output;
    EXPECT_NE(result.output.find("rank 0 on cuda:0"), std::string::npos) << result.output;
    EXPECT_NE(result.output.find(says), std::string::npos) << result.output;
    EXPECT_NE(result.output.find("--resume auto"), std::string::npos) << result.output;
    EXPECT_EQ(std::count(result.output.begin(), result.output.end(), '\n'), 1) << result.output;
  }
};

TEST_F(CudaNccl, OneRankMatchesASerialComputation) {
  if (!enough_for(1)) GTEST_SKIP() << "no GPU here";
  const auto result = play(1, "compare");
  EXPECT_EQ(result.exit_code, 0) << result.output;
}

TEST_F(CudaNccl, TwoRanksMatchASerialComputation) {
  if (!enough_for(2)) GTEST_SKIP() << "needs two GPUs";
  const auto result = play(2, "compare");
  EXPECT_EQ(result.exit_code, 0) << result.output;
}

TEST_F(CudaNccl, ARankThatHangsEndsTheJobWithinTheDeadline) {
  if (!enough_for(2)) GTEST_SKIP() << "needs two GPUs";
  expect_one_line_and_70(play(2, "late"), "within 10 s");
}

TEST_F(CudaNccl, AlsoWhileTheHostIsBlocked) {
  if (!enough_for(2)) GTEST_SKIP() << "needs two GPUs";
  expect_one_line_and_70(play(2, "late_blocked"), "within 10 s");
}

TEST_F(CudaNccl, ARankThatDiesEndsTheJob) {
  if (!enough_for(2)) GTEST_SKIP() << "needs two GPUs";
  const auto result = play(2, "dead");
  EXPECT_FALSE(result.timed_out) << result.output;
  // Whichever is first: mpirun hears of the death, or NCCL loses the connection.
  EXPECT_TRUE(result.exit_code == 9 || result.exit_code == 70) << result.exit_code << ": " << result.output;
}

}  // namespace

// Limits on CPU time, as the kernel's files name them.
#include "kernels/core/cores.h"

#include <gtest/gtest.h>

#include <fstream>

#include "tests/support/temporary_folder.h"

namespace {

class Cores : public testing::Test {
 protected:
  void write(const std::filesystem::path& path, const std::string& text) {
    std::filesystem::create_directories((root() / path).parent_path());
    std::ofstream(root() / path) << text;
  }
  std::filesystem::path root() const { return folder_.path(); }

 private:
  support::TemporaryFolder folder_;
};

TEST_F(Cores, NoFilesAndNoLimitAreNoLimit) {
  EXPECT_EQ(kernels::paid_cores(root()), 0);
  write("proc/self/cgroup", "0::/\n");
  EXPECT_EQ(kernels::paid_cores(root()), 0);
  write("sys/fs/cgroup/cpu.max", "max 100000\n");
  EXPECT_EQ(kernels::paid_cores(root()), 0);
}

TEST_F(Cores, AContainersLimitIsRoundedUp) {
  write("proc/self/cgroup", "0::/\n");
  write("sys/fs/cgroup/cpu.max", "200000 100000\n");
  EXPECT_EQ(kernels::paid_cores(root()), 2);
  write("sys/fs/cgroup/cpu.max", "150000 100000\n");
  EXPECT_EQ(kernels::paid_cores(root()), 2);
  write("sys/fs/cgroup/cpu.max", "5000 100000\n");
  EXPECT_EQ(kernels::paid_cores(root()), 1);
}

TEST_F(Cores, TheTightestOfTheGroupsAboveCounts) {
  write("proc/self/cgroup", "0::/jobs/17/step\n");
  write("sys/fs/cgroup/jobs/cpu.max", "600000 100000\n");
  write("sys/fs/cgroup/jobs/17/cpu.max", "300000 100000\n");
  write("sys/fs/cgroup/jobs/17/step/cpu.max", "max 100000\n");
  EXPECT_EQ(kernels::paid_cores(root()), 3);
}

TEST_F(Cores, TheFirstVersionOfControlGroups) {
  write("proc/self/cgroup", "5:cpuset:/pod\n4:cpu,cpuacct:/pod\n0::/\n");
  write("sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us", "-1\n");
  write("sys/fs/cgroup/cpu/pod/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(kernels::paid_cores(root()), 0);
  write("sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us", "400000\n");
  EXPECT_EQ(kernels::paid_cores(root()), 4);
  // A container whose own group is mounted as the root.
  write("proc/self/cgroup", "4:cpuacct,cpu:/docker/0815\n");
  write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "100000\n");
  write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "50000\n");
  EXPECT_EQ(kernels::paid_cores(root()), 2);
}

TEST_F(Cores, NoMoreThanTheAffinityMask) {
  EXPECT_GE(kernels::available_cores(), 1);
  EXPECT_LE(kernels::available_cores(), kernels::allowed_cores());
}

}  // namespace

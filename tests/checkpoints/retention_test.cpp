#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#include "tests/checkpoints/fixture.h"

namespace checkpoint_test {

using kernels::CheckpointError;

class Retention : public CheckpointTest {
 protected:
  fs::path step(int64_t number) const { return directory_ / fmt::format("step_{:08}", number); }
  void make(std::initializer_list<int64_t> steps) {
    for (int64_t s : steps) {
      State state = small_state(s);
      save(directory_, state, 1);
    }
  }
  void damage(int64_t number) {
    const fs::path file = step(number) / "shard_000.h5";
    std::string bytes = read_all(file);
    bytes[bytes.size() / 3] = static_cast<char>(bytes[bytes.size() / 3] ^ 4);
    write_all(file, bytes);
  }
  std::vector<int64_t> left() const {
    std::vector<int64_t> steps;
    for (const std::string& name : listing()) steps.push_back(std::stoll(name.substr(5)));
    return steps;
  }
  std::function<void(const std::string&)> warn() {
    return [this](const std::string& text) { warnings_.push_back(text); };
  }
  std::vector<std::string> warnings_;
};

using Steps = std::vector<int64_t>;

TEST_F(Retention, TheNewestThatVerifiesIsFound) {
  EXPECT_EQ(checkpoints::find_newest(directory_, true, warn()), fs::path());
  EXPECT_FALSE(checkpoints::has_steps(directory_));
  make({3, 20, 100});
  EXPECT_TRUE(checkpoints::has_steps(directory_));
  EXPECT_EQ(checkpoints::find_newest(directory_, false, warn()), step(100));
  write_all(directory_ / "latest", "step_00000003\n");  // only a hint
  damage(100);
  EXPECT_EQ(checkpoints::find_newest(directory_, false, warn()), step(20));
  EXPECT_TRUE(fs::exists(step(100)));
  ASSERT_EQ(warnings_.size(), 1u);
  EXPECT_NE(warnings_[0].find("step_00000100"), std::string::npos);
  EXPECT_EQ(checkpoints::find_newest(directory_, true, warn()), step(20));
  EXPECT_FALSE(fs::exists(step(100)));
  EXPECT_TRUE(fs::exists(directory_ / "step_00000100.bad"));
  ASSERT_EQ(warnings_.size(), 2u);
  // The same step goes bad again: the first one set aside stays.
  make({100});
  fs::remove(step(100) / "manifest.json");
  EXPECT_EQ(checkpoints::find_newest(directory_, true, warn()), step(20));
  EXPECT_TRUE(fs::exists(directory_ / "step_00000100.bad2"));
}

// Too many open files, found out by HDF5 with some shards open: nothing is wrong with the checkpoint.
TEST_F(Retention, WhatCannotBeReadIsNeitherSetAsideNorPassedOver) {
  make({1});
  State state = small_state(2);
  save(directory_, state, 8);
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  const int lowest = dup(0);
  close(lowest);
  const rlimit few{static_cast<rlim_t>(lowest) + 4, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &few), 0);
  std::string reason;
  try {
    checkpoints::find_newest(directory_, true, warn());
  } catch (const CheckpointError& error) {
    reason = error.what();
  }
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_NE(reason.find(".h5: Too many open files; raise the limit of open files (ulimit -n); " +
                        step(2).string() + " may be good"),
            std::string::npos)
      << reason;
  EXPECT_TRUE(warnings_.empty());
  EXPECT_EQ(listing(), (std::vector<std::string>{"step_00000001", "step_00000002"}));
  EXPECT_EQ(checkpoints::find_newest(directory_, true, warn()), step(2));
}

TEST_F(Retention, NeverSilentlyFromTheBeginning) {
  make({1, 2});
  damage(1);
  damage(2);
  EXPECT_THROW(checkpoints::find_newest(directory_, true, warn()), CheckpointError);
  EXPECT_EQ(warnings_.size(), 2u);
  // All that is left is set aside, and that still counts.
  EXPECT_TRUE(checkpoints::has_steps(directory_));
  EXPECT_THROW(checkpoints::find_newest(directory_, true, warn()), CheckpointError);
}

TEST_F(Retention, APathIsResolved) {
  EXPECT_THROW(checkpoints::resolve(root_, {}), CheckpointError);
  EXPECT_THROW(checkpoints::resolve(root_ / "nothing", {}), CheckpointError);
  make({5, 6});
  EXPECT_EQ(checkpoints::resolve(root_ / "run", {}), step(6));
  EXPECT_EQ(checkpoints::resolve(directory_, {}), step(6));
  EXPECT_EQ(checkpoints::resolve(step(5), {}), step(5));
  damage(6);
  EXPECT_EQ(checkpoints::resolve(root_ / "run", warn()), step(5));
  ASSERT_EQ(warnings_.size(), 1u);
  EXPECT_NE(warnings_[0].find(step(6).string()), std::string::npos) << warnings_[0];
  EXPECT_NE(warnings_[0].find("; it is passed over, step_00000005 is next"), std::string::npos)
      << warnings_[0];
  EXPECT_TRUE(fs::exists(step(6)));
  write_all(root_ / "file", "text");
  EXPECT_THROW(checkpoints::resolve(root_ / "file", {}), CheckpointError);
}

TEST_F(Retention, KeepsTheNewestEveryKthAndTheBest) {
  make({10, 15, 20, 30, 40, 50, 60});
  checkpoints::retain(directory_, 3, 20, 15);
  EXPECT_EQ(left(), (Steps{15, 20, 40, 50, 60}));
  checkpoints::retain(directory_, 0, 0, -1);  // never fewer than two
  EXPECT_EQ(left(), (Steps{50, 60}));
}

TEST_F(Retention, WhatDoesNotVerifyDoesNotCount) {
  make({1, 2, 3, 4, 5});
  damage(5);
  damage(4);
  checkpoints::retain(directory_, 2, 0, -1);
  EXPECT_EQ(left(), (Steps{2, 3, 4, 5}));
  damage(3);
  checkpoints::retain(directory_, 2, 0, -1);
  EXPECT_EQ(left(), (Steps{2, 3, 4, 5}));  // 2 is the only one that verifies
}

}  // namespace checkpoint_test

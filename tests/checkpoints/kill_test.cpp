#include <fmt/format.h>

#include <fstream>
#include <set>
#include <sstream>

#include "tests/checkpoints/fixture.h"
#include "tests/support/process.h"

namespace checkpoint_test {

class Kill : public CheckpointTest {
 protected:
  // save_one under the shim. kill_at 0: to the end, printing the number of calls.
  support::ProcessResult save_one(int64_t step, int64_t variant, long kill_at, bool torn,
                                  const fs::path& calls_to = {}) {
    support::Process process;
    process.arguments = {SAVE_ONE, directory_.string(), std::to_string(step), std::to_string(variant)};
    process.environment = {{"LD_PRELOAD", FAULT_SHIM},
                           {"KILL_AT", std::to_string(kill_at)},
                           {"ASAN_OPTIONS", "verify_asan_link_order=0:detect_leaks=0"}};
    if (torn) process.environment.emplace_back("KILL_TORN", "1");
    if (!calls_to.empty()) process.environment.emplace_back("CALLS_TO", calls_to.string());
    return support::run(process);
  }

  // `latest` never runs ahead of what is durable.
  void check_latest() {
    std::string latest = read_all(directory_ / "latest");
    ASSERT_EQ(latest.size(), std::string("step_00000001\n").size());
    latest.pop_back();
    EXPECT_NO_THROW(checkpoints::Reader{directory_ / latest}) << latest;
  }

  // Kills a save of `step` at every one of its calls; afterwards the newest checkpoint must be exactly the
  // one before or the new one.
  void kill_everywhere(const std::vector<int64_t>& before, int64_t step, int64_t variant, bool torn) {
    const auto restore = [&] {
      fs::remove_all(directory_);
      fs::create_directories(directory_.parent_path());
      fs::copy(root_ / "base", directory_, fs::copy_options::recursive);
    };
    for (int64_t s : before) {
      State state = small_state(s);
      save(root_ / "base", state);
    }
    restore();
    const auto whole = save_one(step, variant, 0, false);
    ASSERT_EQ(whole.exit_code, 0) << whole.output;
    long calls = 0;
    ASSERT_EQ(std::sscanf(whole.output.c_str(), "calls %ld", &calls), 1) << whole.output;
    ASSERT_GT(calls, 30);  // two shards, a manifest, `latest`, each written, synced and moved
    State older = small_state(before.back()), newer = small_state(step, variant);
    long old_seen = 0, new_seen = 0;
    for (long at = 1; at <= calls; ++at) {
      restore();
      EXPECT_EQ(save_one(step, variant, at, torn).exit_code, 137) << at;
      const fs::path found = checkpoints::find_newest(directory_, false, {});
      const bool is_new = newer.compare(found).empty();
      EXPECT_TRUE(is_new || older.compare(found).empty()) << "killed at call " << at << " of " << calls;
      ++(is_new ? new_seen : old_seen);
      check_latest();
      if (at % 7 == 0) {
        State next = small_state(step + 1);
        save(directory_, next);
        EXPECT_EQ(next.compare(checkpoints::find_newest(directory_, false, {})), "") << at;
      }
    }
    EXPECT_GT(old_seen, 0);
    EXPECT_GT(new_seen, 0);
  }
};

TEST_F(Kill, ANewStep) { kill_everywhere({1, 2}, 3, 0, false); }
TEST_F(Kill, ANewStepWithTornWrites) { kill_everywhere({1, 2}, 3, 0, true); }
TEST_F(Kill, TheOnlyStepReplaced) { kill_everywhere({2}, 2, 1, false); }

// What a power failure would undo: content of files and entries of folders that changed since they were
// synced.
class Unsynced {
 public:
  void follow(const std::string& line) {
    std::istringstream words(line);
    std::string call, path, to;
    words >> call >> path >> to;
    ++calls_;
    if (call == "fsync") {
      lost_.erase(path), moved_.erase(path);
    } else if (call.starts_with("rename")) {
      for (const std::string& lost : lost_) EXPECT_FALSE(holds(path, lost)) << lost << ": " << line;
      if (fs::path(to).filename() == "latest") expect_moves_synced(to, line);
      moved_.insert(folder(to));
      lost_.insert({folder(path), folder(to)});
    } else if (call == "mkdir") {
      lost_.insert(folder(path));
    } else if (call.find("write") != std::string::npos) {
      lost_.insert({path, folder(path)});
    } else if (call.starts_with("unlink") || call.starts_with("truncate") || call == "rmdir") {
      expect_moves_synced(path, line);
    }
  }
  void expect_nothing_lost() const {
    EXPECT_GT(calls_, 10);
    for (const std::string& lost : lost_) ADD_FAILURE() << lost << " was never synced";
  }

 private:
  static std::string folder(const std::string& path) { return fs::path(path).parent_path().string(); }
  static bool holds(const std::string& whole, const std::string& part) {
    return (part + "/").starts_with(whole + "/");
  }
  // What is pointed at, and what makes something dispensable, is in place before that.
  void expect_moves_synced(const std::string& path, const std::string& line) const {
    for (const std::string& moved : moved_) EXPECT_FALSE(holds(moved, path)) << moved << ": " << line;
  }
  std::set<std::string> lost_, moved_;  // of the latter, folders with something moved into them
  int calls_ = 0;
};

TEST_F(Kill, NothingIsPointedAtOrRemovedAheadOfWhatTakesItsPlace) {
  for (const int64_t step : {1, 2, 3, 3}) {
    const fs::path calls = root_ / "calls";
    fs::remove(calls);
    ASSERT_EQ(save_one(step, 0, 0, false, calls).exit_code, 0);
    Unsynced unsynced;
    std::ifstream lines(calls);
    for (std::string line; std::getline(lines, line);) unsynced.follow(line);
    unsynced.expect_nothing_lost();
  }
}

}  // namespace checkpoint_test

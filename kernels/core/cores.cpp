#include "kernels/core/cores.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>

namespace kernels {

namespace {

namespace fs = std::filesystem;

// Microseconds of CPU time in a period; files that are not there, or say "max" or -1, set no limit.
double share(const fs::path& quota_file, const fs::path& period_file) {
  double quota = -1, period = 0;
  std::ifstream first(quota_file);
  first >> quota;
  if (period_file == quota_file) {
    first >> period;
  } else {
    std::ifstream(period_file) >> period;
  }
  return quota > 0 && period > 0 ? quota / period : std::numeric_limits<double>::infinity();
}

double share_of_group(const fs::path& groups, const fs::path& group, bool second_version) {
  const fs::path folder = groups / group.relative_path();
  if (second_version) return share(folder / "cpu.max", folder / "cpu.max");
  return share(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us");
}

}  // namespace

int allowed_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

// A limit of any group above counts, too; a container sees the groups above its own as not there.
int paid_cores(const fs::path& root) {
  double least = std::numeric_limits<double>::infinity();
  std::ifstream list(root / "proc/self/cgroup");
  for (std::string line; std::getline(list, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool second_version = controllers == ",,";
    if (!second_version && controllers.find(",cpu,") == std::string::npos) continue;
    const fs::path groups = root / (second_version ? "sys/fs/cgroup" : "sys/fs/cgroup/cpu");
    for (fs::path group = line.substr(second + 1);; group = group.parent_path()) {
      least = std::min(least, share_of_group(groups, group, second_version));
      if (!group.has_relative_path()) break;
    }
  }
  return std::isinf(least) ? 0 : std::max(1, static_cast<int>(std::ceil(least)));
}

int available_cores() {
  const int allowed = allowed_cores(), paid = paid_cores();
  return paid > 0 ? std::min(allowed, paid) : allowed;
}

}  // namespace kernels

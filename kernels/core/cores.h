#pragma once
// How many cores this process has.
#include <filesystem>

namespace kernels {

// Cores that the affinity mask names.
int allowed_cores();
// Cores that the CPU time of the process's control groups (a container's --cpus, a pod's limit) pays for,
// rounded up: quota / period of the tightest, in version 2 or 1 of control groups. 0 where there is no limit.
// Reads proc/self/cgroup and sys/fs/cgroup below `root`.
int paid_cores(const std::filesystem::path& root = "/");
// The fewer of both: what threads default to. More threads than are paid for stand still together for most of
// every period.
int available_cores();

}  // namespace kernels

#pragma once
// The job as main sees it: its ranks, where they compute, and how it ends when something fails.
#include <chrono>
#include <exception>
#include <memory>
#include <optional>
#include <string>

#include "comm/communicator.h"
#include "configs/config.h"
#include "kernels/core/context.h"
#include "kernels/core/stream.h"

namespace launch {

// 0 done; 2 usage or configuration; 70 watchdog; 74 unreadable or corrupt file; 75 asked to stop, saved; 1
// else.
inline constexpr int kExitStopped = 75;
int exit_code_of(const std::exception_ptr& problem);
// The message of an exception on one line.
std::string one_line(const std::exception_ptr& problem);

// Thrown by join() on every rank once a problem was reported: the job ends quietly with this exit code.
struct Refused {
  int exit_code;
};

class Job {
 public:
  Job(int* argc, char*** argv) : argc_(argc), argv_(argv) {}

  // Starts the message passing between the ranks of this job, where it was launched with several. Called
  // once, by all of them, with what went wrong on this rank so far: if anything did on any rank, the lowest
  // such rank reports it in one line and every rank throws Refused.
  comm::Session& join(std::chrono::seconds deadline = std::chrono::minutes(10),
                      const std::exception_ptr& problem = nullptr);
  // join() for a command that one process does alone; ConfigError when there are several.
  comm::Session& join_alone(const std::string& command);
  bool joined() const { return session_.has_value(); }

  // Reports a problem of this rank in one line and ends the other ranks too. Returns the exit code where this
  // rank is the only one, and does not return otherwise.
  int fail(const std::exception_ptr& problem);

 private:
  int* argc_;
  char*** argv_;
  std::optional<comm::Session> session_;
};

// Where a rank computes: the context's stream lives as long as this.
struct Placement {
  std::unique_ptr<kernels::OwnedStream> stream;
  kernels::Context ctx;
};
// Chooses device and threads of this rank, together with the others; warns (rank 0) where the threads of a
// host exceed its cores. `device` is train.device: local rank r gets GPU r; auto takes GPUs where every rank
// of every host can have one. ConfigError when cuda is asked for and cannot be had. `threads` is
// train.threads.
Placement place(comm::Session& session, bool speaks, const std::string& device, int64_t threads);

}  // namespace launch

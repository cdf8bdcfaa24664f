#pragma once
// The thread that notices when GPUs stop talking to each other.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kernels/core/stream.h"

struct ncclComm;

namespace comm {

class NcclWatchdog {
 public:
  // who: "rank 3 on cuda:1", for messages.
  NcclWatchdog(std::string who, kernels::Device device, std::chrono::milliseconds deadline);
  ~NcclWatchdog();
  NcclWatchdog(const NcclWatchdog&) = delete;
  NcclWatchdog& operator=(const NcclWatchdog&) = delete;

  // Until the next of these two calls: the host is inside a call of NCCL that has to return within the
  // deadline, or else `problem`; or the communicator is at work. False when something went wrong before: then
  // the communicator is aborted, and nobody else may end it.
  bool expect_return(std::string problem);
  void guard(ncclComm* communicator);
  // What `stream` holds now has to be done within the deadline.
  void watch(kernels::Stream stream);
  // CommTimeout with what went wrong, if anything did.
  void check();

 private:
  using Clock = std::chrono::steady_clock;
  struct Watched {
    std::unique_ptr<kernels::Event> event;
    Clock::time_point since;
  };
  void run();
  void collect_done();
  std::string find_problem();
  void end_job(std::unique_lock<std::mutex>& lock);

  const std::string who_;
  const kernels::Device device_;
  const std::chrono::milliseconds deadline_;
  std::mutex mutex_;
  std::condition_variable changed_;
  ncclComm* communicator_ = nullptr;
  std::string expected_;
  Clock::time_point since_ = Clock::now();
  std::deque<Watched> watched_;
  std::vector<std::unique_ptr<kernels::Event>> spare_;
  std::string problem_;
  bool reported_ = false, ending_ = false;
  std::atomic<bool> failed_ = false;
  std::thread thread_;
};

}  // namespace comm

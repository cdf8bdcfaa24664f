#include "comm/nccl_watchdog.h"

#include <fmt/format.h>
#include <nccl.h>

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "comm/communicator.h"

namespace comm {

namespace {
constexpr auto kPeriod = std::chrono::milliseconds(100);
// How long a host may take to come back and report, once NCCL was aborted.
constexpr auto kGrace = std::chrono::seconds(10);
// Points that are watched at once.
constexpr size_t kWatched = 8;
constexpr int kExitWatchdog = 70;
}  // namespace

NcclWatchdog::NcclWatchdog(std::string who, kernels::Device device, std::chrono::milliseconds deadline)
    : who_(std::move(who)), device_(device), deadline_(deadline) {
  for (size_t i = 0; i < kWatched; ++i) spare_.push_back(std::make_unique<kernels::Event>(device));
  thread_ = std::thread([this] { run(); });
}

NcclWatchdog::~NcclWatchdog() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

bool NcclWatchdog::expect_return(std::string problem) {
  const std::lock_guard lock(mutex_);
  if (failed_) return false;
  communicator_ = nullptr;
  expected_ = std::move(problem);
  since_ = Clock::now();
  return true;
}

void NcclWatchdog::guard(ncclComm* communicator) {
  const std::lock_guard lock(mutex_);
  communicator_ = communicator;
}

void NcclWatchdog::watch(kernels::Stream stream) {
  const std::lock_guard lock(mutex_);
  if (spare_.empty()) collect_done();
  if (spare_.empty()) {
    // The last one stands for this work too.
    watched_.back().event->record(stream);
    watched_.back().since = Clock::now();
    return;
  }
  Watched next{std::move(spare_.back()), Clock::now()};
  spare_.pop_back();
  next.event->record(stream);
  watched_.push_back(std::move(next));
}

void NcclWatchdog::check() {
  if (!failed_) return;
  const std::lock_guard lock(mutex_);
  reported_ = true;
  throw CommTimeout(problem_);
}

void NcclWatchdog::collect_done() {
  while (!watched_.empty() && watched_.front().event->done()) {
    spare_.push_back(std::move(watched_.front().event));
    watched_.pop_front();
  }
}

// What is wrong now; empty when nothing is. Called with the lock held.
std::string NcclWatchdog::find_problem() {
  const auto now = Clock::now();
  const double seconds = static_cast<double>(deadline_.count()) / 1000.0;
  if (!communicator_) {
    if (expected_.empty() || now - since_ <= deadline_) return {};
    return fmt::format("{}: {} within {} s; see which rank or host is missing, then start the job again",
                       who_, expected_, seconds);
  }
  ncclResult_t state = ncclSuccess;
  if (ncclCommGetAsyncError(communicator_, &state) != ncclSuccess ||
      (state != ncclSuccess && state != ncclInProgress))
    return fmt::format(
        "{}: NCCL lost another rank ({}); see which rank stopped first and whether its host and GPU are "
        "well, "
        "then restart the job with --resume auto",
        who_, ncclGetErrorString(state));
  collect_done();
  if (watched_.empty() || now - watched_.front().since <= deadline_) return {};
  return fmt::format(
      "{}: its GPU did not finish a step within {} s, most likely because another rank does not answer; see "
      "which "
      "rank or host hangs, then restart the job with --resume auto",
      who_, seconds);
}

void NcclWatchdog::run() {
  std::unique_lock lock(mutex_);
  try {
    kernels::use_device(device_);
    while (!ending_ && problem_.empty()) {
      changed_.wait_for(lock, kPeriod, [&] { return ending_; });
      if (!ending_) problem_ = find_problem();
    }
  } catch (const kernels::DeviceError& error) {
    problem_ = fmt::format(
        "{}: {}; see whether its GPU is well (nvidia-smi), then restart the job with --resume auto", who_,
        error.what());
  }
  if (!problem_.empty()) end_job(lock);
}

// Gives the host the chance to report and end the job in order, and ends this process where it does not.
void NcclWatchdog::end_job(std::unique_lock<std::mutex>& lock) {
  failed_ = true;
  if (communicator_) {
    // The abort itself may wait for the GPU.
    std::thread([communicator = communicator_] { ncclCommAbort(communicator); }).detach();
    if (changed_.wait_for(lock, kGrace, [&] { return ending_; })) return;
  }
  if (!reported_) fmt::print(stderr, "{}\n", problem_);
  std::fflush(nullptr);
  std::_Exit(kExitWatchdog);
}

}  // namespace comm

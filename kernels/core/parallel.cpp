#include "kernels/core/parallel.h"

#include <fmt/format.h>
#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <exception>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/core/cores.h"
#include "kernels/core/error.h"

namespace kernels {

namespace {

// About 50 microseconds of spinning before a thread sleeps: longer than the gaps inside a decode step,
// shorter than a scheduler tick.
constexpr int kSpins = 4000;
// After about 2 microseconds the caller, done with its own part, looks what others have not begun.
constexpr int kPatience = 40;
thread_local bool inside_region = false;

class Team {
 public:
  explicit Team(int count) : count_(count), claims_(static_cast<size_t>(count)) {
    try {
      for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (const std::exception&) {
      end();
      throw DeviceError(fmt::format("the system does not start {} threads; lower train.threads", count));
    }
  }
  ~Team() { end(); }
  int count() const { return count_; }

  void run(detail::RegionFn fn, void* state) {
    fn_ = fn;
    state_ = state;
    pending_.store(count_ - 1, std::memory_order_relaxed);
    const uint32_t epoch = epoch_.fetch_add(1) + 1;  // ahead of sleepers_, so that no wake-up is missed
    if (sleepers_.load() > 0) epoch_.notify_all();
    call(0);
    for (int spins = 0; pending_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins == kPatience) take_over(epoch);
      if (spins < kSpins)
        _mm_pause();
      else
        sched_yield();
    }
    if (failed_.load(std::memory_order_relaxed)) {
      failed_ = false;
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }

 private:
  void end() {
    stop_ = true;
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  void call(int thread) {
    inside_region = true;
    try {
      fn_(state_, thread, count_);
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
    inside_region = false;
  }

  // Whether thread `i`'s part of region `epoch` has not been begun, and is the asker's to do now.
  bool claim(int i, uint32_t epoch) {
    uint32_t before = epoch - 1;
    return claims_[static_cast<size_t>(i)].epoch.compare_exchange_strong(before, epoch);
  }
  void finish(int i) {
    call(i);
    pending_.fetch_sub(1, std::memory_order_release);
  }
  // Does what threads that sleep, or have no core at the moment, have not begun.
  void take_over(uint32_t epoch) {
    for (int i = 1; i < count_; ++i)
      if (claim(i, epoch)) finish(i);
  }

  void work(int thread) {
    // Signals are the main thread's, which has a stack for their handlers: oneDNN's products keep their stack
    // pointer inside their own memory, where a handler would write over what is there.
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
    uint32_t seen = 0;
    while (true) {
      for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen && spins < kSpins; ++spins)
        _mm_pause();
      if (epoch_.load(std::memory_order_acquire) == seen) {
        sleepers_.fetch_add(1);
        epoch_.wait(seen);
        sleepers_.fetch_sub(1);
      }
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_) return;
      if (claim(thread, seen)) finish(thread);
    }
  }

  // The last region in which a thread's part was begun.
  struct alignas(64) Claim {
    std::atomic<uint32_t> epoch{0};
  };

  const int count_;
  std::vector<Claim> claims_;
  std::vector<std::thread> workers_;
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> pending_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false}, failed_{false};
  std::exception_ptr error_;
  detail::RegionFn fn_ = nullptr;
  void* state_ = nullptr;
};

std::unique_ptr<Team>& team() {
  static std::unique_ptr<Team> instance;
  return instance;
}

}  // namespace

void set_threads(int count) {
  const int wanted = count > 0 ? count : available_cores();
  if (team() && team()->count() == wanted) return;
  team().reset();
  team() = std::make_unique<Team>(wanted);
}

int threads() {
  if (!team()) set_threads(0);
  return team()->count();
}

OnOneThread::OnOneThread() : before_(std::exchange(inside_region, true)) {}
OnOneThread::~OnOneThread() { inside_region = before_; }

void detail::run_region(RegionFn fn, void* state) {
  if (inside_region || threads() == 1) return fn(state, 0, 1);
  team()->run(fn, state);
}

}  // namespace kernels

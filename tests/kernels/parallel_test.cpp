// The team of threads: every part of a region once, whoever does it.
#include "kernels/core/parallel.h"

#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "kernels/core/error.h"

namespace {

class Parallel : public testing::Test {
 protected:
  ~Parallel() override { kernels::set_threads(0); }
};

// Which thread did each part of a region. The caller's own is the first: where it waits for the others, each
// has a thread of its own.
std::vector<pthread_t> parts_of_region(int threads, bool wait = false) {
  std::vector<pthread_t> did(static_cast<size_t>(threads));
  std::vector<std::atomic<int>> times(static_cast<size_t>(threads));
  std::atomic<int> begun{0};
  kernels::parallel_region([&](int part, int count) {
    EXPECT_EQ(count, threads);
    did[static_cast<size_t>(part)] = pthread_self();
    ++times[static_cast<size_t>(part)];
    ++begun;
    while (wait && part == 0 && begun < threads) std::this_thread::yield();
  });
  for (const auto& n : times) EXPECT_EQ(n, 1);
  return did;
}

TEST_F(Parallel, EveryPartIsDoneOnce) {
  for (const int threads : {1, 2, 3, 5}) {
    kernels::set_threads(threads);
    for (int i = 0; i < 2000; ++i) parts_of_region(threads, i % 2 == 0);
    // Threads that have gone to sleep.
    for (int i = 0; i < 5; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      parts_of_region(threads);
    }
  }
}

TEST_F(Parallel, AnExceptionOfAnyPartIsTheCallers) {
  kernels::set_threads(3);
  for (const int thrower : {0, 1, 2}) {
    EXPECT_THROW(kernels::parallel_region([&](int part, int) {
                   if (part == thrower) throw std::runtime_error("part");
                 }),
                 std::runtime_error);
    parts_of_region(3);
  }
}

TEST_F(Parallel, RegionsInsideOthersStayOnTheirThread) {
  kernels::set_threads(3);
  kernels::parallel_region([&](int, int) {
    const pthread_t outer = pthread_self();
    kernels::parallel_region([&](int part, int count) {
      EXPECT_EQ(part, 0);
      EXPECT_EQ(count, 1);
      EXPECT_TRUE(pthread_equal(outer, pthread_self()));
    });
  });
}

#ifndef __SANITIZE_ADDRESS__  // which needs the memory that is forbidden here
TEST_F(Parallel, ThreadsThatCannotBeStartedAreAnError) {
  const auto start_too_many = [] {
    const rlimit limit{1 << 30, 1 << 30};  // bytes of addresses, far fewer than the threads' stacks
    if (setrlimit(RLIMIT_AS, &limit) != 0) std::exit(1);
    try {
      kernels::set_threads(4096);
    } catch (const kernels::DeviceError& e) {
      std::fputs(e.what(), stderr);
      std::exit(3);
    }
    std::exit(2);
  };
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(start_too_many(), testing::ExitedWithCode(3), "does not start 4096 threads; lower");
}
#endif

std::atomic<bool> held{false}, released{false};

// Holds its thread where the system might have taken its core away; gives up after ten seconds.
void hold(int) {
  held = true;
  timespec pause{0, 1000000};
  for (int i = 0; i < 10000 && !released; ++i) nanosleep(&pause, nullptr);
}

TEST_F(Parallel, TheCallerDoesWhatAThreadWithoutACoreHasNotBegun) {
  struct sigaction action {
  }, before{};
  action.sa_handler = hold;
  ASSERT_EQ(sigaction(SIGUSR2, &action, &before), 0);
  kernels::set_threads(2);
  const pthread_t worker = parts_of_region(2, true)[1];
  ASSERT_FALSE(pthread_equal(worker, pthread_self()));
  // Which takes no signals otherwise. The caller waits, so that the second part is the worker's.
  std::atomic<bool> open{false};
  kernels::parallel_region([&](int part, int) {
    while (part == 0 && !open) std::this_thread::yield();
    if (part == 0) return;
    sigset_t one;
    sigemptyset(&one);
    sigaddset(&one, SIGUSR2);
    pthread_sigmask(SIG_UNBLOCK, &one, nullptr);
    open = true;
  });
  ASSERT_EQ(pthread_kill(worker, SIGUSR2), 0);
  while (!held) std::this_thread::yield();
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(pthread_equal(parts_of_region(2)[1], pthread_self()));
  released = true;
  EXPECT_TRUE(pthread_equal(parts_of_region(2, true)[1], worker));
  sigaction(SIGUSR2, &before, nullptr);
}

}  // namespace

// Handlers of signals that come at any moment.
#include "launch/signals.h"

#include <gtest/gtest.h>
#include <pthread.h>

#include <atomic>
#include <csignal>
#include <thread>

#include "kernels/core/parallel.h"
#include "kernels/ops/linear.h"
#include "tests/support/tensor_buffer.h"

namespace {

using kernels::DType;
using support::TensorBuffer;

// Matrix products of oneDNN keep their stack pointer inside their own memory.
TEST(Signals, DoNoHarmWhileMatricesAreMultiplied) {
  launch::watch_stop_signals();
  for (const int signal : {SIGUSR1, SIGTERM, SIGINT}) {
    struct sigaction now {};
    sigaction(signal, nullptr, &now);
    EXPECT_TRUE(now.sa_flags & SA_ONSTACK) << signal;
  }
  stack_t stack{};
  sigaltstack(nullptr, &stack);
  EXPECT_FALSE(stack.ss_flags & SS_DISABLE);
  TensorBuffer x(DType::f16, {512, 384}), w(DType::f16, {512, 384}), dy(DType::f16, {512, 512}),
      dx(DType::f16, {512, 384}), expected(DType::f16, {512, 384});
  x.fill_normal(1);
  w.fill_normal(2);
  dy.fill_normal(3);
  kernels::set_threads(2);
  kernels::linear_backward_input({}, dy, w, expected);
  std::atomic<bool> done{false};
  const pthread_t main = pthread_self();
  std::thread sender([&] {
    sigset_t own;
    sigfillset(&own);
    pthread_sigmask(SIG_BLOCK, &own, nullptr);
    while (!done) {
      pthread_kill(main, SIGUSR1);
      kill(getpid(), SIGUSR1);  // whichever thread takes it
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  });
  for (int i = 0; i < 300; ++i) {
    kernels::linear_backward_input({}, dy, w, dx);
    if (dx.bytes() != expected.bytes()) ADD_FAILURE() << "product " << i;
  }
  done = true;
  sender.join();
  EXPECT_TRUE(launch::stop_requested());
  kernels::set_threads(0);
}

}  // namespace

#include "launch/signals.h"

#include <csignal>

namespace launch {
namespace {

volatile std::sig_atomic_t requested = 0;

void request(int) { requested = 1; }

void watch(int signal, int flags) {
  struct sigaction action {};
  action.sa_handler = request;
  action.sa_flags = SA_RESTART | flags;
  sigemptyset(&action.sa_mask);
  sigaction(signal, &action, nullptr);
}

}  // namespace

void watch_stop_signals() {
  watch(SIGUSR1, 0);
  watch(SIGTERM, 0);
  watch(SIGINT, static_cast<int>(SA_RESETHAND));
}

bool stop_requested() { return requested != 0; }

}  // namespace launch

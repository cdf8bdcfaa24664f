#include "launch/signals.h"

#include <unistd.h>

#include <csignal>
#include <vector>

namespace launch {
namespace {

volatile std::sig_atomic_t requested = 0;

void request(int) { requested = 1; }

void watch(int signal, int flags) {
  struct sigaction action {};
  action.sa_handler = request;
  action.sa_flags = SA_RESTART | SA_ONSTACK | flags;
  sigemptyset(&action.sa_mask);
  sigaction(signal, &action, nullptr);
}

// A stack of their own for handlers on this thread. While oneDNN multiplies, the stack pointer lies inside
// the product's memory: a handler that went on from there would write over its neighbours.
void give_handlers_a_stack() {
  // For as long as there can be a signal: never freed.
  static auto* memory = new std::vector<char>(static_cast<size_t>(sysconf(_SC_SIGSTKSZ)) + (64 << 10));
  stack_t stack{};
  stack.ss_sp = memory->data();
  stack.ss_size = memory->size();
  sigaltstack(&stack, nullptr);
}

}  // namespace

void watch_stop_signals() {
  give_handlers_a_stack();
  watch(SIGUSR1, 0);
  watch(SIGTERM, 0);
  watch(SIGINT, static_cast<int>(SA_RESETHAND));
}

bool stop_requested() { return requested != 0; }

}  // namespace launch

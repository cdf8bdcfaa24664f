#pragma once
// The CPU threads of this process: one team, started once, that spins briefly between regions and then
// sleeps, so that a decode step of a hundred short operations is not dominated by wake-ups. Regions do not
// nest: a region started inside another runs on the calling thread.
#include <cstdint>
#include <type_traits>

namespace kernels {

// Number of threads of the team, the caller included. May be set again between regions. 0 means
// available_cores(). DeviceError where the system does not start as many.
void set_threads(int count);
int threads();

// While it lives, regions that this thread starts run on it alone: for work beside that of the team, which
// serves one thread at a time.
class OnOneThread {
 public:
  OnOneThread();
  ~OnOneThread();
  OnOneThread(const OnOneThread&) = delete;
  OnOneThread& operator=(const OnOneThread&) = delete;

 private:
  bool before_;
};

namespace detail {
using RegionFn = void (*)(void* state, int thread, int count);
void run_region(RegionFn fn, void* state);
}  // namespace detail

// Calls fn(part, count) once for each thread of the team, on that thread, and returns when all are done; what
// a thread has not begun because it sleeps, or another program has its core, the caller does. Parts must not
// wait for each other. The first exception is rethrown.
template <typename Fn>
void parallel_region(Fn&& fn) {
  using F = std::remove_reference_t<Fn>;
  detail::run_region([](void* s, int thread, int count) { (*static_cast<F*>(s))(thread, count); }, &fn);
}

// Splits [0, n) into one contiguous range per thread, in multiples of grain, and calls fn(begin, end) on
// each. Work of at most one grain stays on the caller. The ranges depend on n, grain and threads() alone.
template <typename Fn>
void parallel_for(int64_t n, int64_t grain, Fn&& fn) {
  const int64_t blocks = (n + grain - 1) / grain;
  if (blocks <= 1 || threads() == 1) {
    if (n > 0) fn(int64_t{0}, n);
    return;
  }
  parallel_region([&](int thread, int count) {
    const int64_t begin = blocks * thread / count * grain;
    const int64_t end = blocks * (thread + 1) / count * grain;
    if (begin < n && begin < end) fn(begin, end < n ? end : n);
  });
}

}  // namespace kernels

#include "comm/gradient_reducer.h"

#include <algorithm>

#include "comm/checks.h"

namespace comm {

GradientReducer::GradientReducer(Communicator& communicator, Tensor gradients, size_t bucket_bytes)
    : communicator_(communicator), gradients_(gradients) {
  check_reducible("gradient reducer", gradients);
  const auto element = static_cast<int64_t>(kernels::size_of(gradients.dtype));
  const int64_t bucket = std::max<int64_t>(1, (static_cast<int64_t>(bucket_bytes) + element - 1) / element);
  int64_t end = gradients.numel();
  while (end > 0) {
    // What would be left over for a bucket of less than the minimum joins this one.
    const int64_t begin = end >= 2 * bucket ? end - bucket : 0;
    buckets_.emplace_back(begin, end);
    end = begin;
  }
  in_flight_.reserve(buckets_.size());
}

void GradientReducer::ready(int64_t begin) {
  for (; next_ < buckets_.size() && buckets_[next_].first >= begin; ++next_) {
    if (communicator_.size() == 1) continue;
    const auto [first, last] = buckets_[next_];
    void* data =
        static_cast<char*>(gradients_.data) + static_cast<size_t>(first) * kernels::size_of(gradients_.dtype);
    in_flight_.push_back(
        communicator_.all_reduce_async(Tensor(data, gradients_.dtype, {last - first}), Reduce::sum));
  }
}

void GradientReducer::progress() {
  for (auto& request : in_flight_) request->test();
}

void GradientReducer::finish() {
  ready(0);
  for (auto& request : in_flight_) request->wait();
  in_flight_.clear();
  next_ = 0;
}

}  // namespace comm

#include "comm/gradient_reducer.h"

#include <fmt/format.h>

#include <algorithm>

#include "comm/checks.h"

namespace comm {

GradientReducer::GradientReducer(Communicator& communicator, Tensor gradients, const Buckets& buckets)
    : communicator_(communicator), gradients_(gradients), shard_(buckets.shard), joined_(buckets.joined) {
  const int64_t shard = buckets.shard;
  check_reducible("gradient reducer", gradients);
  if (shard < 0 || (shard > 0 && shard * communicator.size() < gradients.numel()))
    throw kernels::ShapeError(fmt::format("gradient reducer: {} shards of {} elements do not hold {}",
                                          communicator.size(), shard, to_string(gradients)));
  const auto element = static_cast<int64_t>(kernels::size_of(gradients.dtype));
  const int64_t bucket = std::max<int64_t>(1, (static_cast<int64_t>(buckets.bytes) + element - 1) / element);
  int64_t end = gradients.numel();
  while (end > 0) {
    const int64_t bottom =
        std::max(shard > 0 ? (end - 1) / shard * shard : 0, end > buckets.last ? buckets.last : 0);
    // What would be left over for a bucket of less than the minimum joins this one.
    const int64_t begin = end - bottom >= 2 * bucket ? end - bucket : bottom;
    buckets_.emplace_back(begin, end);
    end = begin;
  }
  in_flight_.reserve(buckets_.size());
}

void GradientReducer::send(int64_t begin, int64_t end) {
  const Tensor bucket = gradients_.slice(begin, end - begin);
  in_flight_.push_back(shard_ > 0
                           ? communicator_.reduce_async(bucket, Reduce::sum, static_cast<int>(begin / shard_))
                           : communicator_.all_reduce_async(bucket, Reduce::sum));
}

void GradientReducer::ready(int64_t begin) {
  const auto owner = [&](int64_t element) { return shard_ > 0 ? element / shard_ : 0; };
  while (next_ < buckets_.size() && buckets_[next_].first >= begin) {
    auto [first, end] = buckets_[next_++];
    while (joined_ && next_ < buckets_.size() && buckets_[next_].first >= begin &&
           owner(buckets_[next_].first) == owner(first))
      first = buckets_[next_++].first;
    if (communicator_.size() > 1) send(first, end);
  }
}

void GradientReducer::progress() {
  communicator_.poll();
  for (auto& request : in_flight_) request->test();
}

void GradientReducer::finish() {
  ready(0);
  for (auto& request : in_flight_) request->wait();
  in_flight_.clear();
  next_ = 0;
}

}  // namespace comm

#include "comm/gradient_reducer.h"

#include <fmt/format.h>

#include <algorithm>

#include "comm/checks.h"

namespace comm {

GradientReducer::GradientReducer(Communicator& communicator, Tensor gradients, size_t bucket_bytes,
                                 int64_t shard)
    : communicator_(communicator), gradients_(gradients), shard_(shard) {
  check_reducible("gradient reducer", gradients);
  if (shard < 0 || (shard > 0 && shard * communicator.size() < gradients.numel()))
    throw kernels::ShapeError(fmt::format("gradient reducer: {} shards of {} elements do not hold {}",
                                          communicator.size(), shard, to_string(gradients)));
  const auto element = static_cast<int64_t>(kernels::size_of(gradients.dtype));
  const int64_t bucket = std::max<int64_t>(1, (static_cast<int64_t>(bucket_bytes) + element - 1) / element);
  int64_t end = gradients.numel();
  while (end > 0) {
    const int64_t bottom = shard > 0 ? (end - 1) / shard * shard : 0;
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
  for (; next_ < buckets_.size() && buckets_[next_].first >= begin; ++next_)
    if (communicator_.size() > 1) send(buckets_[next_].first, buckets_[next_].second);
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

#include "comm/gradient_reducer.h"

#include <fmt/format.h>

#include <algorithm>

#include "comm/checks.h"

namespace comm {

namespace {

void check_parts(std::vector<GradientRange> parts, int64_t elements) {
  std::sort(parts.begin(), parts.end());
  int64_t covered = 0;
  bool once = true;
  for (const auto& [begin, end] : parts) {
    once &= begin == covered && end >= begin;
    covered = end;
  }
  if (!once || covered != elements)
    throw kernels::ShapeError(
        fmt::format("gradient reducer: the parts do not cover {} elements once each", elements));
}

}  // namespace

GradientReducer::GradientReducer(Communicator& communicator, Tensor gradients,
                                 const std::vector<GradientRange>& parts, const Buckets& buckets)
    : communicator_(communicator), gradients_(gradients), shard_(buckets.shard), parts_(parts) {
  check_reducible("gradient reducer", gradients);
  check_parts(parts, gradients.numel());
  if (shard_ < 0 || (shard_ > 0 && shard_ * communicator.size() < gradients.numel()))
    throw kernels::ShapeError(fmt::format("gradient reducer: {} shards of {} elements do not hold {}",
                                          communicator.size(), shard_, to_string(gradients)));
  cut(buckets);
  in_flight_.reserve(buckets_.size());
}

void GradientReducer::cut(const Buckets& buckets) {
  const auto element = static_cast<int64_t>(kernels::size_of(gradients_.dtype));
  const int64_t enough = std::max<int64_t>(1, (static_cast<int64_t>(buckets.bytes) + element - 1) / element);
  GradientRange run{0, 0};  // parts, each below the one ahead of it, that no bucket holds yet
  for (size_t i = 0; i < parts_.size(); ++i) {
    const auto [begin, end] = parts_[i];
    if (end != run.first) {
      add(run, i - 1);
      run.second = end;
    }
    run.first = begin;
    while (run.second - run.first >= enough) {
      const int64_t bottom = buckets.joined ? run.first : run.second - enough;
      add({bottom, run.second}, i);
      run.second = bottom;
    }
  }
  add(run, parts_.size() - 1);
}

void GradientReducer::add(GradientRange range, size_t part) {
  while (range.second > range.first) {
    const int64_t shard = shard_ > 0 ? (range.second - 1) / shard_ * shard_ : 0;
    const int64_t bottom = std::max(range.first, shard);
    buckets_.push_back({{bottom, range.second}, part});
    range.second = bottom;
  }
}

std::vector<GradientRange> GradientReducer::buckets() const {
  std::vector<GradientRange> ranges;
  for (const Bucket& bucket : buckets_) ranges.push_back(bucket.range);
  return ranges;
}

void GradientReducer::ready(GradientRange part) {
  if (final_ == parts_.size() || parts_[final_] != part)
    throw kernels::ShapeError(fmt::format("gradient reducer: [{}, {}) is not part {} of the gradients",
                                          part.first, part.second, final_));
  ++final_;
  send_whole();
}

void GradientReducer::send_whole() {
  for (; next_ < buckets_.size() && buckets_[next_].part < final_; ++next_) {
    if (communicator_.size() == 1) continue;
    const auto [begin, end] = buckets_[next_].range;
    const Tensor bucket = gradients_.slice(begin, end - begin);
    in_flight_.push_back(
        shard_ > 0 ? communicator_.reduce_async(bucket, Reduce::sum, static_cast<int>(begin / shard_))
                   : communicator_.all_reduce_async(bucket, Reduce::sum));
  }
}

void GradientReducer::progress() {
  communicator_.poll();
  for (auto& request : in_flight_) request->test();
}

void GradientReducer::finish() {
  final_ = parts_.size();
  send_whole();
  for (auto& request : in_flight_) request->wait();
  in_flight_.clear();
  final_ = next_ = 0;
}

}  // namespace comm

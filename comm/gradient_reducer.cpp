#include "comm/gradient_reducer.h"

#include <fmt/format.h>

#include <algorithm>

#include "comm/checks.h"

namespace comm {

namespace {

void check_parts(std::vector<GradientRange> parts, int64_t elements, int64_t stripe) {
  std::sort(parts.begin(), parts.end());
  int64_t covered = 0;
  bool once = true;
  for (const auto& [begin, end] : parts) {
    once &= begin == covered && end >= begin;
    covered = end;
  }
  const int64_t padding = elements - covered;
  if (!once || padding < 0 || (padding > 0 && padding >= stripe))
    throw kernels::ShapeError(
        fmt::format("gradient reducer: the parts do not cover {} elements once each", elements));
}

// What each part, being the last of a stripe's to become final, makes whole.
std::vector<GradientRange> whole_stripes(const std::vector<GradientRange>& parts, int64_t elements,
                                         int64_t stripe) {
  std::vector<size_t> last(static_cast<size_t>(elements / stripe), 0);
  std::vector<GradientRange> whole(parts.size(), {0, 0});
  for (size_t i = 0; i < parts.size(); ++i)
    for (int64_t s = parts[i].first / stripe; s * stripe < parts[i].second; ++s)
      last[static_cast<size_t>(s)] = i;
  for (size_t s = 0; s < last.size(); ++s) {
    auto& [begin, end] = whole[last[s]];
    if (begin == end) begin = static_cast<int64_t>(s) * stripe;
    end = static_cast<int64_t>(s + 1) * stripe;
  }
  return whole;
}

}  // namespace

GradientReducer::GradientReducer(Communicator& communicator, Tensor gradients,
                                 const std::vector<GradientRange>& parts, const Buckets& buckets)
    : communicator_(communicator), gradients_(gradients), stripe_(buckets.stripe), parts_(parts) {
  check_reducible("gradient reducer", gradients);
  check_parts(parts, gradients.numel(), stripe_);
  if (stripe_ < 0 ||
      (stripe_ > 0 && (stripe_ % communicator.size() != 0 || gradients.numel() % stripe_ != 0)))
    throw kernels::ShapeError(fmt::format("gradient reducer: {} is not cut into stripes of {} for {} ranks",
                                          to_string(gradients), stripe_, communicator.size()));
  cut(buckets);
  in_flight_.reserve(buckets_.size());
}

void GradientReducer::cut(const Buckets& buckets) {
  const auto element = static_cast<int64_t>(kernels::size_of(gradients_.dtype));
  const int64_t grain = std::max<int64_t>(1, stripe_);
  const auto grains = (static_cast<int64_t>(buckets.bytes) + element * grain - 1) / (element * grain);
  const int64_t enough = std::max<int64_t>(1, grains) * grain;
  const auto ranges = stripe_ > 0 ? whole_stripes(parts_, gradients_.numel(), stripe_) : parts_;
  GradientRange run{0, 0};  // parts, each below the one ahead of it, that no bucket holds yet
  const auto add = [&](int64_t begin, size_t part) {
    if (run.second > begin) buckets_.push_back({{begin, run.second}, part});
    run.second = begin;
  };
  for (size_t i = 0; i < ranges.size(); ++i) {
    const auto [begin, end] = ranges[i];
    if (begin == end) continue;
    if (end != run.first) {
      add(run.first, i - 1);
      run.second = end;
    }
    run.first = begin;
    while (run.second - run.first >= enough) add(buckets.joined ? run.first : run.second - enough, i);
  }
  add(run.first, ranges.size() - 1);
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
    if (stripe_ == 0) {
      in_flight_.push_back(communicator_.all_reduce_async(bucket, Reduce::sum));
      continue;
    }
    const kernels::Shape cut{(end - begin) / stripe_, communicator_.size(), stripe_ / communicator_.size()};
    in_flight_.push_back(communicator_.reduce_scatter_async(bucket.view(cut), Reduce::sum));
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

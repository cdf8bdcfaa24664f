#include "kernels/core/arena.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace kernels {

namespace {
constexpr size_t kAlignment = 64;
// Addresses handed out while measuring: never mapped, and not null.
constexpr size_t kRehearsalBase = size_t{1} << 46;
size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
}  // namespace

Arena::Arena(std::string segment, Device device) : segment_(std::move(segment)), device_(device) {}

Arena::~Arena() {
  if (base_) free_bytes(device_, base_);
}

Tensor Arena::allocate(const char* name, DType dtype, Shape shape) {
  const size_t bytes = aligned(static_cast<size_t>(shape.numel()) * size_of(dtype));
  const size_t begin = offset_;
  if (!measuring() && begin + bytes > capacity_)
    throw DeviceError(fmt::format("segment '{}' is full: '{}' needs {} bytes and {} of {} are free", segment_,
                                  name, bytes, capacity_ - begin, capacity_));
  offset_ = begin + bytes;
  if (measuring()) {
    live_.push_back({name, bytes});
    live_offsets_.push_back(begin);
    if (offset_ > high_water_) {
      high_water_ = offset_;
      peak_ = live_;
    }
    return Tensor(reinterpret_cast<void*>(kRehearsalBase + begin), dtype, shape, device_);
  }
  return Tensor(base_ + begin, dtype, shape, device_);
}

void Arena::place(size_t minimum) {
  if (!measuring()) throw DeviceError(fmt::format("segment '{}' is already placed", segment_));
  capacity_ = aligned(std::max({high_water_, minimum, kAlignment}));
  base_ = static_cast<char*>(allocate_bytes(device_, capacity_));
  offset_ = 0;
  live_.clear();
  live_offsets_.clear();
}

void Arena::release(size_t mark) {
  offset_ = mark;
  while (!live_offsets_.empty() && live_offsets_.back() >= mark) {
    live_offsets_.pop_back();
    live_.pop_back();
  }
}

}  // namespace kernels

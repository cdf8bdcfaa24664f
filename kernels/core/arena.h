#pragma once
// Memory planned by rehearsing the run. An arena first measures: it hands out tensors with addresses that
// must not be touched, and records names, bytes and the high-water mark. place() then takes one block of
// exactly that size, and the same sequence of requests yields real memory. Nothing is allocated afterwards.
#include <cstddef>
#include <string>
#include <vector>

#include "kernels/core/tensor.h"

namespace kernels {

class Arena {
 public:
  struct Entry {
    std::string name;
    size_t bytes;
  };

  Arena(std::string segment, Device device);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // A dense tensor, 64-byte aligned, not initialised. After place(), a request beyond the measured size is a
  // DeviceError that names the segment.
  Tensor allocate(const char* name, DType dtype, Shape shape);

  bool measuring() const { return base_ == nullptr; }
  // Ends measuring: allocates high_water() bytes (at least `minimum`) and starts again at the bottom.
  void place(size_t minimum = 0);
  size_t high_water() const { return high_water_; }
  const std::string& segment() const { return segment_; }
  // What was alive at the high-water mark, in order of request.
  const std::vector<Entry>& peak_entries() const { return peak_; }

  // Last in, first out: release(mark()) frees everything requested since.
  size_t mark() const { return offset_; }
  void release(size_t mark);

 private:
  std::string segment_;
  Device device_;
  char* base_ = nullptr;
  size_t capacity_ = 0, offset_ = 0, high_water_ = 0;
  std::vector<Entry> live_, peak_;
  std::vector<size_t> live_offsets_;
};

// Frees what a scope took from an arena when the scope ends.
class ArenaScope {
 public:
  explicit ArenaScope(Arena& arena) : arena_(arena), mark_(arena.mark()) {}
  ~ArenaScope() { arena_.release(mark_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena& arena_;
  size_t mark_;
};

}  // namespace kernels

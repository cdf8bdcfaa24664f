#pragma once
// Device work in order: streams, events, captured graphs and page-locked staging memory. On the CPU an
// operation has finished when its call returns, so everything here does nothing there. The destructors never
// throw.
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "kernels/core/device.h"

namespace kernels {

// Owns a stream that runs beside others; null on the CPU. Of work that waits for multiprocessors, that of an
// urgent stream is the first to get some.
class OwnedStream {
 public:
  explicit OwnedStream(Device device, bool urgent = false);
  ~OwnedStream();
  OwnedStream(const OwnedStream&) = delete;
  OwnedStream& operator=(const OwnedStream&) = delete;
  Stream get() const { return stream_; }

 private:
  Stream stream_;
};

// A point in a stream's work. record() may be called again and again; waits refer to the last record. Both
// may be captured into a graph: that is how a second stream joins the capture and leaves it again.
class Event {
 public:
  explicit Event(Device device, bool timing = false);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(Stream stream);
  void wait(Stream stream) const;  // work put into `stream` from now on starts after the event
  bool done() const;               // never blocks
  void synchronize() const;        // blocks the host
  float milliseconds_since(const Event& start) const;  // both with timing, both done

 private:
  void* handle_ = nullptr;
};

// Work recorded once and launched as a whole. Destroy a graph that holds communication before its
// communicator.
class Graph {
 public:
  Graph() = default;
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  // Everything put into the stream between the two calls is recorded, not run. A DeviceError when something
  // inside cannot be recorded; the stream is usable again after it.
  static void begin(Stream stream);
  void end(Stream stream);
  bool ready() const { return executable_ != nullptr; }
  void launch(Stream stream) const;

 private:
  void* executable_ = nullptr;
};

// Page-locked memory: copies from and to it run beside the host. Plain memory in a build or on a machine
// without CUDA.
class PinnedBuffer {
 public:
  PinnedBuffer(Device device, size_t bytes);
  ~PinnedBuffer();
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  Device device_;
  void* data_ = nullptr;
  size_t size_ = 0;
};

// In the stream's order; the host does not wait. Host memory must be page-locked, and stay until the copy has
// run. At least one side is on the stream's device; on the CPU a plain copy.
void copy_async(void* dst, const void* src, size_t bytes, Device device, Stream stream);
void synchronize(Device device, Stream stream);
// Makes `device` the one that this thread's CUDA calls mean.
void use_device(Device device);

// How often this process waited for a device and took device memory: a step is not allowed to do either.
struct DeviceCounters {
  std::atomic<int64_t> synchronizations = 0, allocations = 0;
};
DeviceCounters& device_counters();

}  // namespace kernels

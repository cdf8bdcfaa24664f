#include "kernels/core/stream.h"

#include <cstdlib>
#include <cstring>

#include "kernels/cuda/device.h"

namespace kernels {

OwnedStream::OwnedStream(Device device, bool urgent) {
  if constexpr (kCudaEnabled)
    if (device.is_cuda()) stream_.handle = cuda::create_stream(device.index, urgent);
}

OwnedStream::~OwnedStream() {
  if constexpr (kCudaEnabled)
    if (stream_.handle) cuda::destroy_stream(stream_.handle);
}

Event::Event(Device device, bool timing) {
  if constexpr (kCudaEnabled)
    if (device.is_cuda()) handle_ = cuda::create_event(device.index, timing);
  (void)timing;
}

Event::~Event() {
  if constexpr (kCudaEnabled)
    if (handle_) cuda::destroy_event(handle_);
}

void Event::record(Stream stream) {
  if constexpr (kCudaEnabled)
    if (handle_) cuda::record_event(handle_, stream.handle);
  (void)stream;
}

void Event::wait(Stream stream) const {
  if constexpr (kCudaEnabled)
    if (handle_) cuda::wait_event(stream.handle, handle_);
  (void)stream;
}

bool Event::done() const {
  if constexpr (kCudaEnabled)
    if (handle_) return cuda::event_done(handle_);
  return true;
}

void Event::synchronize() const {
  if constexpr (kCudaEnabled)
    if (handle_) cuda::synchronize_event(handle_);
}

float Event::milliseconds_since(const Event& start) const {
  if constexpr (kCudaEnabled)
    if (handle_) return cuda::milliseconds_between(start.handle_, handle_);
  (void)start;
  return 0;
}

Graph::~Graph() {
  if constexpr (kCudaEnabled)
    if (executable_) cuda::destroy_graph(executable_);
}

void Graph::begin(Stream stream) {
  if constexpr (kCudaEnabled)
    if (stream.handle) cuda::begin_capture(stream.handle);
  (void)stream;
}

void Graph::end(Stream stream) {
  if constexpr (kCudaEnabled)
    if (stream.handle) {
      if (executable_) cuda::destroy_graph(executable_);
      executable_ = nullptr;
      executable_ = cuda::end_capture(stream.handle);
    }
  (void)stream;
}

void Graph::launch(Stream stream) const {
  if constexpr (kCudaEnabled)
    if (executable_) cuda::launch_graph(executable_, stream.handle);
  (void)stream;
}

PinnedBuffer::PinnedBuffer(Device device, size_t bytes) : device_(device), size_(bytes) {
  if constexpr (kCudaEnabled)
    if (device.is_cuda()) {
      data_ = cuda::allocate_pinned(bytes);
      return;
    }
  data_ = allocate_bytes(Device{}, bytes);
}

PinnedBuffer::~PinnedBuffer() {
  if constexpr (kCudaEnabled)
    if (device_.is_cuda()) {
      cuda::free_pinned(data_);
      return;
    }
  free_bytes(Device{}, data_);
}

void copy_async(void* dst, const void* src, size_t bytes, Device device, Stream stream) {
  if (bytes == 0) return;
  if constexpr (kCudaEnabled)
    if (device.is_cuda()) return cuda::copy_async(dst, src, bytes, stream.handle);
  (void)stream;
  std::memcpy(dst, src, bytes);
}

void synchronize(Device device, Stream stream) {
  if constexpr (kCudaEnabled)
    if (device.is_cuda()) cuda::synchronize_stream(stream.handle);
  (void)device, (void)stream;
}

void use_device(Device device) {
  if constexpr (kCudaEnabled)
    if (device.is_cuda()) cuda::use_device(device.index);
  (void)device;
}

DeviceCounters& device_counters() {
  static DeviceCounters counters;
  return counters;
}

}  // namespace kernels

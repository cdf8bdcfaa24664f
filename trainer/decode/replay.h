#pragma once
// Work of a decoding step that comes again and again with other values at the same addresses, and what the
// host reads of its results. On the CPU work just runs, and results are read where they are.
#include <array>
#include <functional>
#include <map>
#include <memory>

#include "kernels/core/context.h"
#include "kernels/core/stream.h"
#include "kernels/core/tensor.h"

namespace trainer {

// On a GPU: work runs as it is the first time it comes under its key, is recorded as a CUDA graph the second
// time, and launched as a whole from then on. The key says everything that the host decides about the work:
// which it is, shapes, scalars, addresses other than those in ctx.scratch. Work may neither wait for the
// device nor copy from memory of the host. Destroy it before the memory that its work touches.
class Replay {
 public:
  using Key = std::array<int64_t, 5>;
  explicit Replay(bool enabled) : enabled_(enabled) {}
  void operator()(const kernels::Context& ctx, const Key& key, const std::function<void()>& work);
  int64_t recorded() const;  // how many graphs there are

 private:
  struct Recorded {
    bool warm = false;
    kernels::Graph graph;
  };
  void forget_other_memory(const kernels::Context& ctx);

  bool enabled_;
  std::map<Key, Recorded> recorded_;
  const void *scratch_ = nullptr, *stream_ = nullptr;  // that the graphs were recorded with
};

// What the host reads of a device tensor: on a GPU page-locked memory that send() fills in the stream's
// order, valid once the stream has been waited for; on the CPU the tensor itself.
class HostCopy {
 public:
  void send(const kernels::Context& ctx, const kernels::Tensor& t);
  template <typename T>
  const T* data() const {
    return static_cast<const T*>(data_);
  }

 private:
  std::unique_ptr<kernels::PinnedBuffer> memory_;
  const void* data_ = nullptr;
};

// Small results that the host reads after every step, or numbers that it gives to one: on a GPU in
// page-locked memory, which kernels write and read over the bus, so that no copy is needed; valid once the
// stream has been waited for, and to be written only then.
class SharedResult {
 public:
  SharedResult(kernels::Device device, kernels::DType dtype, kernels::Shape shape);
  const kernels::Tensor& tensor() const { return tensor_; }
  template <typename T>
  const T* data() const {
    return static_cast<const T*>(tensor_.data);
  }

 private:
  kernels::PinnedBuffer memory_;
  kernels::Tensor tensor_;
};

// Copies dense memory on the device, in the stream's order.
inline void copy_on_device(const kernels::Context& ctx, const kernels::Tensor& from,
                           const kernels::Tensor& to) {
  kernels::copy_async(to.data, from.data, to.bytes(), ctx.device, ctx.stream);
}

}  // namespace trainer

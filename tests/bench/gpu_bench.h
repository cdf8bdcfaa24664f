#pragma once
// What the benchmarks of operations on a GPU share: device memory with values, a rehearsed context, the GPU's
// clock.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "kernels/core/context.h"
#include "kernels/core/philox.h"
#include "kernels/core/stream.h"

namespace gpu_bench {

using kernels::Context;
using kernels::DType;
using kernels::Tensor;

inline const kernels::Device kDevice{kernels::Device::Kind::cuda, 0};

// A tensor that owns its memory. fp16: normal values, the same million again and again.
struct Buffer {
  Tensor tensor;
  Buffer(DType dtype, kernels::Shape shape)
      : tensor(kernels::allocate_bytes(kDevice, static_cast<size_t>(shape.numel()) * size_of(dtype)), dtype,
               shape, kDevice) {
    if (dtype == DType::f16) fill();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { kernels::free_bytes(kDevice, tensor.data); }

  void fill() {
    static const std::vector<kernels::f16> values = [] {
      std::vector<kernels::f16> values(1 << 20);
      for (size_t i = 0; i < values.size(); ++i)
        values[i] = kernels::f16(kernels::normal(1, kernels::Purpose::test, i));
      return values;
    }();
    const size_t bytes = values.size() * sizeof(kernels::f16);
    for (size_t at = 0; at < tensor.bytes(); at += bytes)
      kernels::copy_bytes(static_cast<char*>(tensor.data) + at, kDevice, values.data(), {},
                          std::min(bytes, tensor.bytes() - at));
  }
  template <typename T>
  void set(const std::vector<T>& values) {
    kernels::copy_bytes(tensor.data, kDevice, values.data(), {}, values.size() * sizeof(T));
  }
};

inline bool skip(benchmark::State& state) {
  if (kernels::cuda_device_count() > 0) return false;
  state.SkipWithError("no GPU");
  return true;
}

// A context whose working memory `call` has rehearsed.
struct Bench {
  kernels::OwnedStream stream{kDevice};
  kernels::Arena scratch{"scratch", kDevice};
  Context ctx{.device = kDevice, .stream = stream.get(), .scratch = &scratch, .rehearsal = true};

  void rehearse(const std::function<void()>& call) {
    call();
    scratch.place();
    ctx.rehearsal = false;
  }
  // Times `call`, which does `times` of what is measured, by the GPU's clock.
  void measure(benchmark::State& state, int times, const std::function<void()>& call) {
    kernels::Event begin(kDevice, true), end(kDevice, true);
    for (int i = 0; i < 3; ++i) call();
    for (auto _ : state) {
      begin.record(ctx.stream);
      call();
      end.record(ctx.stream);
      end.synchronize();
      state.SetIterationTime(end.milliseconds_since(begin) * 1e-3 / times);
    }
  }
};

}  // namespace gpu_bench

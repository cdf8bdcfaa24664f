#pragma once
// What the benchmarks of operations on a GPU share: device memory with values, a context with working memory,
// the GPU's clock.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "kernels/core/context.h"
#include "kernels/core/philox.h"
#include "kernels/core/stream.h"

namespace gpu_bench {

using kernels::Context;
using kernels::DType;
using kernels::Shape;
using kernels::Tensor;

inline constexpr kernels::Device kDevice{kernels::Device::Kind::cuda, 0};

// How a Buffer begins: normal values times `scale` (or their sizes), integers from 0 to below `below`.
struct Fill {
  double scale = 1;
  bool positive = false;
  int32_t below = 1;
};

// A tensor that owns its memory, filled with the same million values again and again.
struct Buffer {
  Tensor tensor;
  Buffer(DType dtype, Shape shape, const Fill& fill = {})
      : tensor(kernels::allocate_bytes(kDevice, static_cast<size_t>(shape.numel()) * size_of(dtype)), dtype,
               shape, kDevice) {
    if (dtype == DType::i32)
      repeat<int32_t>([&](float x) { return static_cast<int32_t>(std::abs(x) * 1e6f) % fill.below; });
    else if (dtype == DType::i64 || dtype == DType::u8)
      repeat<char>([](float) { return char{0}; });
    else
      kernels::visit_dtype(dtype, [&](auto tag) {
        using T = decltype(tag);
        repeat<T>(
            [&](float x) { return T(static_cast<float>(fill.scale * (fill.positive ? std::abs(x) : x))); });
      });
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { kernels::free_bytes(kDevice, tensor.data); }
  operator const Tensor&() const { return tensor; }

  template <typename T>
  void set(const std::vector<T>& values) {
    kernels::copy_bytes(tensor.data, kDevice, values.data(), {}, values.size() * sizeof(T));
  }

 private:
  template <typename T, typename Fn>
  void repeat(const Fn& of_normal) {
    static const std::vector<float> normal = [] {
      std::vector<float> values(1 << 20);
      for (size_t i = 0; i < values.size(); ++i) values[i] = kernels::normal(1, kernels::Purpose::test, i);
      return values;
    }();
    std::vector<T> values(std::min(normal.size(), tensor.bytes() / sizeof(T)));
    for (size_t i = 0; i < values.size(); ++i) values[i] = of_normal(normal[i]);
    const size_t bytes = values.size() * sizeof(T);
    for (size_t at = 0; at < tensor.bytes(); at += bytes)
      kernels::copy_bytes(static_cast<char*>(tensor.data) + at, kDevice, values.data(), {},
                          std::min(bytes, tensor.bytes() - at));
  }
};

inline bool skip(benchmark::State& state) {
  if (kernels::cuda_device_count() > 0) return false;
  state.SkipWithError(kernels::cuda_problem().c_str());
  return true;
}

struct Bench {
  kernels::OwnedStream stream{kDevice};
  kernels::Arena scratch{"scratch", kDevice};
  Context ctx{.device = kDevice, .stream = stream.get(), .scratch = &scratch, .rehearsal = true};

  // Places the working memory that `call` asks for.
  void rehearse(const std::function<void()>& call) {
    call();
    scratch.place();
    ctx.rehearsal = false;
  }
  // Times `call`, which does `times` of what is measured, by the GPU's clock.
  void measure(benchmark::State& state, int times, const std::function<void()>& call) {
    kernels::Event begin(kDevice, true), end(kDevice, true);
    for (int i = 0; i < 3; ++i) call();
    while (state.KeepRunningBatch(times)) {
      begin.record(ctx.stream);
      call();
      end.record(ctx.stream);
      end.synchronize();
      state.SetIterationTime(end.milliseconds_since(begin) * 1e-3);
    }
  }
  // The same out of a graph, so that launching costs what it costs in a step; rehearsed, and called once
  // before for what is chosen at the first call.
  void measure_recorded(benchmark::State& state, int times, const std::function<void()>& call) {
    rehearse(call);
    call();
    kernels::Graph graph;
    kernels::Graph::begin(ctx.stream);
    call();
    graph.end(ctx.stream);
    measure(state, times, [&] { graph.launch(ctx.stream); });
  }
};

}  // namespace gpu_bench

// Softmax attention on a GPU: training, forward and backward, and one decoding step out of a graph.
#include "tests/bench/gpu_attention_bench.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "kernels/ops/linear.h"
#include "kernels/ops/softmax_attention.h"

namespace {

using namespace gpu_bench;

// Arguments: sequences, length, heads, head size, backward, deterministic, uniform.
void gpu_attention_train(benchmark::State& state) {
  if (skip(state)) return;
  const int64_t b = state.range(0), t = state.range(1), h = state.range(2), d = state.range(3), n = b * t;
  const bool backward = state.range(4) != 0, uniform = state.range(6) != 0;
  const kernels::AttentionHints hints{.longest = t, .uniform = uniform, .deterministic = state.range(5) != 0};
  Buffer qkv(DType::f16, {n, 3 * h * d}), dqkv(DType::f16, {n, 3 * h * d}), o(DType::f16, {n, h, d}),
      dout(DType::f16, {n, h, d}), log_sum(DType::f32, {n, h}), boundaries(DType::i32, {b + 1});
  boundaries.set(even_boundaries(b, t));
  const Tensor q = part(qkv, 0, h, d), k = part(qkv, 1, h, d), v = part(qkv, 2, h, d);
  Bench bench;
  const auto run_forward = [&] {
    kernels::softmax_attention(bench.ctx, q, k, v, boundaries, o, log_sum, hints);
  };
  const auto run_backward = [&] {
    kernels::softmax_attention_backward(bench.ctx, dout, q, k, v, o, log_sum, boundaries, part(dqkv, 0, h, d),
                                        part(dqkv, 1, h, d), part(dqkv, 2, h, d), hints);
  };
  bench.rehearse([&] { run_forward(), run_backward(); });
  run_forward();
  bench.measure(state, 1, backward ? std::function<void()>(run_backward) : run_forward);
  const double products = (backward ? 5 : 2) * static_cast<double>(n * t * h * d);  // half of them are masked
  state.counters["TFLOP/s"] =
      benchmark::Counter(products * 1e-12, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["scratch_MiB"] = static_cast<double>(bench.scratch.high_water()) / (1 << 20);
}
BENCHMARK(gpu_attention_train)
    ->ArgNames({"sequences", "length", "heads", "width", "backward", "deterministic", "uniform"})
    ->ArgsProduct({{32}, {1024}, {12}, {64}, {0, 1}, {1}, {0, 1}})
    ->ArgsProduct({{16}, {1024}, {12}, {64}, {0, 1}, {1}, {1}})
    ->ArgsProduct({{4}, {8192}, {16}, {128}, {0, 1}, {1}, {0, 1}})
    ->Args({32, 1024, 12, 64, 1, 0, 1})
    ->Args({4, 8192, 16, 128, 1, 0, 1})
    ->Unit(benchmark::kMicrosecond)
    ->UseManualTime();

// Arguments: sequences, rows of each, committed tokens. One iteration is a layer's share of a step; twelve
// layers, each with a cache of its own, are one graph.
void gpu_attention_decode(benchmark::State& state) {
  if (skip(state)) return;
  const int64_t b = state.range(0), rows = state.range(1), length = state.range(2);
  constexpr int64_t kHeads = DecodeStep::kHeads, kWidth = DecodeStep::kWidth, kLayers = DecodeStep::kLayers;
  const DecodeStep step(b, rows, length);
  std::vector<std::unique_ptr<Buffer>> caches;
  const int64_t capacity = std::max(int64_t{1024}, length + rows);
  for (int64_t i = 0; i < 2 * kLayers; ++i)
    caches.push_back(std::make_unique<Buffer>(DType::f16, Shape{b, capacity, kHeads, kWidth}));
  Bench bench;
  bench.measure_recorded(state, kLayers, [&] {
    for (size_t i = 0; i < caches.size(); i += 2)
      kernels::softmax_attention_decode(bench.ctx, step.q(), step.k(), step.v(), step.rows(), *caches[i],
                                        *caches[i + 1], step.o);
  });
  state.counters["GB/s"] = benchmark::Counter(static_cast<double>(b * length * kHeads * kWidth * 4) * 1e-9,
                                              benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(gpu_attention_decode)
    ->ArgNames({"sequences", "rows", "length"})
    ->ArgsProduct({{1}, {1, 8, 32, 64}, {256, 512, 1000, 8000}})
    ->ArgsProduct({{8, 64}, {1, 32}, {1000}})
    ->Unit(benchmark::kMicrosecond)
    ->UseManualTime();

}  // namespace

// Softmax attention on a GPU: training, forward and backward, and one decoding step out of a graph.
#include <benchmark/benchmark.h>

#include <functional>
#include <memory>
#include <vector>

#include "kernels/ops/linear.h"
#include "kernels/ops/softmax_attention.h"
#include "tests/bench/gpu_bench.h"

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
  std::vector<int32_t> cu;
  for (int64_t s = 0; s <= b; ++s) cu.push_back(static_cast<int32_t>(s * t));
  boundaries.set(cu);
  const auto part = [&](const Buffer& x, int64_t i) {
    return x.tensor.columns(i * h * d, h * d).view({n, h, d});
  };
  Bench bench;
  const auto run_forward = [&] {
    kernels::softmax_attention(bench.ctx, part(qkv, 0), part(qkv, 1), part(qkv, 2), boundaries.tensor,
                               o.tensor, log_sum.tensor, hints);
  };
  const auto run_backward = [&] {
    kernels::softmax_attention_backward(bench.ctx, dout.tensor, part(qkv, 0), part(qkv, 1), part(qkv, 2),
                                        o.tensor, log_sum.tensor, boundaries.tensor, part(dqkv, 0),
                                        part(dqkv, 1), part(dqkv, 2), hints);
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
  constexpr int64_t kHeads = 12, kWidth = 64, kLayers = 12;
  const int64_t b = state.range(0), rows = state.range(1), length = state.range(2), n = b * rows;
  Buffer qkv(DType::f16, {n, 3 * kHeads * kWidth}), o(DType::f16, {n, kHeads, kWidth}),
      first(DType::i32, {b + 1}), lengths(DType::i32, {b}), positions(DType::i32, {n}),
      ancestors(DType::i64, {n});
  std::vector<std::unique_ptr<Buffer>> caches;
  for (int64_t i = 0; i < 2 * kLayers; ++i)
    caches.push_back(std::make_unique<Buffer>(DType::f16, kernels::Shape{b, length + rows, kHeads, kWidth}));
  std::vector<int32_t> begins;
  std::vector<int64_t> masks;
  for (int64_t s = 0; s <= b; ++s) begins.push_back(static_cast<int32_t>(s * rows));
  for (int64_t i = 0; i < n; ++i) masks.push_back(static_cast<int64_t>((uint64_t{2} << (i % rows)) - 1));
  first.set(begins), ancestors.set(masks);
  lengths.set(std::vector<int32_t>(static_cast<size_t>(b), static_cast<int32_t>(length)));
  const auto part = [&](int64_t i) {
    return qkv.tensor.columns(i * kHeads * kWidth, kHeads * kWidth).view({n, kHeads, kWidth});
  };
  Bench bench;
  const auto step = [&] {
    for (size_t i = 0; i < static_cast<size_t>(kLayers); ++i)
      kernels::softmax_attention_decode(bench.ctx, part(0), part(1), part(2),
                                        {first.tensor, lengths.tensor, positions.tensor, ancestors.tensor},
                                        caches[2 * i]->tensor, caches[2 * i + 1]->tensor, o.tensor);
  };
  bench.rehearse(step);
  kernels::Graph graph;
  kernels::Graph::begin(bench.ctx.stream);
  step();
  graph.end(bench.ctx.stream);
  bench.measure(state, kLayers, [&] { graph.launch(bench.ctx.stream); });
  state.counters["GB/s"] = benchmark::Counter(static_cast<double>(b * length * kHeads * kWidth * 4) * 1e-9,
                                              benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(gpu_attention_decode)
    ->ArgNames({"sequences", "rows", "length"})
    ->ArgsProduct({{1}, {1, 8, 32, 64}, {256, 1000, 8000}})
    ->ArgsProduct({{8, 64}, {1, 32}, {1000}})
    ->Unit(benchmark::kMicrosecond)
    ->UseManualTime();

}  // namespace

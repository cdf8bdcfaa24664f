// Linear attention on a GPU: training, forward and backward, and one decoding step out of a graph.
#include <benchmark/benchmark.h>

#include <functional>
#include <memory>
#include <vector>

#include "kernels/ops/linear.h"
#include "kernels/ops/linear_attention.h"
#include "tests/bench/gpu_attention_bench.h"

namespace {

using namespace gpu_bench;

enum Pass { kForward, kBackward, kBoth };

// Arguments: sequences, length, heads, head size, pass, normalised.
void gpu_linear_attention_train(benchmark::State& state) {
  if (skip(state)) return;
  const int64_t b = state.range(0), t = state.range(1), h = state.range(2), d = state.range(3), n = b * t;
  const int64_t pass = state.range(4);
  const kernels::LinearAttentionParams params{.normalise = state.range(5) != 0};
  const DType out = params.normalise ? DType::f16 : DType::f32;
  Buffer qkv(DType::f16, {n, 3 * h * d}), dqkv(DType::f16, {n, 3 * h * d}), o(out, {n, h, d}),
      dout(DType::f16, {n, h, d}), denominator(DType::f32, {n, h}), boundaries(DType::i32, {b + 1});
  boundaries.set(even_boundaries(b, t));
  const Tensor q = part(qkv, 0, h, d), k = part(qkv, 1, h, d), v = part(qkv, 2, h, d);
  Bench bench;
  const auto forward = [&] {
    kernels::linear_attention(bench.ctx, params, q, k, v, boundaries, o, denominator);
  };
  const auto backward = [&] {
    kernels::linear_attention_backward(bench.ctx, params, dout, q, k, v, o, denominator, boundaries,
                                       part(dqkv, 0, h, d), part(dqkv, 1, h, d), part(dqkv, 2, h, d));
  };
  const std::function<void()> passes[] = {forward, backward, [&] { forward(), backward(); }};
  bench.rehearse([&] { forward(), backward(); });
  forward();
  bench.measure(state, 1, passes[pass]);
  // The fewest operations (chunks of 64) and bytes: each input read once, each result written once.
  const double operations = (pass == kForward    ? 4
                             : pass == kBackward ? 10
                                                 : 14) *
                            static_cast<double>(n * h * d * (64 + d)),
               tensors = pass == kForward    ? 4
                         : pass == kBackward ? 8
                                             : 12;
  const auto rate = benchmark::Counter::kIsIterationInvariantRate;
  state.counters["TFLOP/s"] = benchmark::Counter(operations * 1e-12, rate);
  state.counters["GB/s"] = benchmark::Counter(tensors * static_cast<double>(n * h * d * 2) * 1e-9, rate);
  state.counters["scratch_MiB"] = static_cast<double>(bench.scratch.high_water()) / (1 << 20);
}
BENCHMARK(gpu_linear_attention_train)
    ->ArgNames({"sequences", "length", "heads", "width", "pass", "normalised"})
    ->ArgsProduct({{4}, {8192}, {16}, {128}, {kForward, kBackward, kBoth}, {1}})
    ->Args({4, 8192, 16, 128, kBoth, 0})
    ->ArgsProduct({{1}, {32768}, {16}, {128}, {kForward, kBackward, kBoth}, {1}})
    ->ArgsProduct({{16}, {1024}, {12}, {64}, {kForward, kBackward, kBoth}, {1}})
    ->ArgsProduct({{4}, {8192}, {12}, {64}, {kForward, kBackward, kBoth}, {1}})
    ->Unit(benchmark::kMicrosecond)
    ->UseManualTime();

// Arguments: sequences, rows of each, rows since the fold. One iteration is a layer's share of a step, its
// commit included; twelve layers, each with a state of its own, are one graph.
void gpu_linear_attention_decode(benchmark::State& state) {
  if (skip(state)) return;
  const int64_t b = state.range(0), rows = state.range(1), since = state.range(2);
  constexpr int64_t kHeads = DecodeStep::kHeads, kWidth = DecodeStep::kWidth, kLayers = DecodeStep::kLayers;
  const DecodeStep step(b, rows, since);
  Buffer accepted(DType::i32, {b, kernels::kMaxDecodeRows}), counts(DType::i32, {b});
  std::vector<std::unique_ptr<Buffer>> memory;
  const auto make = [&](DType dtype, Shape shape) {
    memory.push_back(std::make_unique<Buffer>(dtype, shape));
    return memory.back()->tensor;
  };
  std::vector<kernels::LinearAttentionState> states;
  for (int64_t i = 0; i < kLayers; ++i)
    states.push_back({make(DType::f32, {b, kHeads, kWidth, kWidth}), make(DType::f32, {b, kHeads, kWidth}),
                      make(DType::f32, {b, 2 * kernels::kFold, kHeads, kWidth}),
                      make(DType::f16, {b, 2 * kernels::kFold, kHeads, kWidth})});
  std::vector<int32_t> path;
  for (int64_t i = 0; i < b * kernels::kMaxDecodeRows; ++i)
    path.push_back(static_cast<int32_t>(i % kernels::kMaxDecodeRows));
  accepted.set(path);
  counts.set(std::vector<int32_t>(static_cast<size_t>(b), 1));
  Bench bench;
  bench.measure_recorded(state, kLayers, [&] {
    for (kernels::LinearAttentionState& layer : states) {
      kernels::linear_attention_decode(bench.ctx, {}, step.q(), step.k(), step.v(), step.rows(), layer,
                                       step.o);
      kernels::linear_attention_commit(bench.ctx, {accepted, counts, step.lengths}, layer);
    }
  });
  const auto bytes = static_cast<double>(b * kHeads * kWidth * (4 * kWidth + 6 * since));
  state.counters["GB/s"] = benchmark::Counter(bytes * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}
// since 63: every step folds.
BENCHMARK(gpu_linear_attention_decode)
    ->ArgNames({"sequences", "rows", "since"})
    ->ArgsProduct({{1}, {1, 8, 32, 64}, {0, 32}})
    ->ArgsProduct({{8, 64}, {1, 32}, {32}})
    ->ArgsProduct({{1, 64}, {1}, {63}})
    ->Unit(benchmark::kMicrosecond)
    ->UseManualTime();

}  // namespace

// Linear attention on a GPU: training, forward and backward, and one decoding step out of a graph.
#include <benchmark/benchmark.h>

#include <functional>
#include <memory>
#include <vector>

#include "kernels/ops/linear.h"
#include "kernels/ops/linear_attention.h"
#include "tests/bench/gpu_bench.h"

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
  std::vector<int32_t> cu;
  for (int64_t s = 0; s <= b; ++s) cu.push_back(static_cast<int32_t>(s * t));
  boundaries.set(cu);
  const auto part = [&](const Buffer& x, int64_t i) {
    return x.tensor.columns(i * h * d, h * d).view({n, h, d});
  };
  Bench bench;
  const auto forward = [&] {
    kernels::linear_attention(bench.ctx, params, part(qkv, 0), part(qkv, 1), part(qkv, 2), boundaries.tensor,
                              o.tensor, denominator.tensor);
  };
  const auto backward = [&] {
    kernels::linear_attention_backward(bench.ctx, params, dout.tensor, part(qkv, 0), part(qkv, 1),
                                       part(qkv, 2), o.tensor, denominator.tensor, boundaries.tensor,
                                       part(dqkv, 0), part(dqkv, 1), part(dqkv, 2));
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
  constexpr int64_t kHeads = 12, kWidth = 64, kLayers = 12;
  const int64_t b = state.range(0), rows = state.range(1), since = state.range(2), n = b * rows;
  Buffer qkv(DType::f16, {n, 3 * kHeads * kWidth}), o(DType::f16, {n, kHeads, kWidth}),
      first(DType::i32, {b + 1}), lengths(DType::i32, {b}), positions(DType::i32, {n}),
      ancestors(DType::i64, {n}), accepted(DType::i32, {b, kernels::kMaxDecodeRows}), counts(DType::i32, {b});
  std::vector<std::unique_ptr<Buffer>> memory;
  std::vector<kernels::LinearAttentionState> states;
  const auto make = [&](DType dtype, kernels::Shape shape) {
    memory.push_back(std::make_unique<Buffer>(dtype, shape));
    return memory.back()->tensor;
  };
  for (int64_t i = 0; i < kLayers; ++i)
    states.push_back({make(DType::f32, {b, kHeads, kWidth, kWidth}), make(DType::f32, {b, kHeads, kWidth}),
                      make(DType::f32, {b, 2 * kernels::kFold, kHeads, kWidth}),
                      make(DType::f16, {b, 2 * kernels::kFold, kHeads, kWidth})});
  std::vector<int32_t> begins, path;
  std::vector<int64_t> masks;
  for (int64_t s = 0; s <= b; ++s) begins.push_back(static_cast<int32_t>(s * rows));
  for (int64_t i = 0; i < n; ++i) masks.push_back(static_cast<int64_t>((uint64_t{2} << (i % rows)) - 1));
  for (int64_t i = 0; i < b * kernels::kMaxDecodeRows; ++i)
    path.push_back(static_cast<int32_t>(i % kernels::kMaxDecodeRows));
  first.set(begins), ancestors.set(masks), accepted.set(path);
  lengths.set(std::vector<int32_t>(static_cast<size_t>(b), static_cast<int32_t>(since)));
  counts.set(std::vector<int32_t>(static_cast<size_t>(b), 1));
  const auto part = [&](int64_t i) {
    return qkv.tensor.columns(i * kHeads * kWidth, kHeads * kWidth).view({n, kHeads, kWidth});
  };
  Bench bench;
  const auto step = [&] {
    for (kernels::LinearAttentionState& layer : states) {
      kernels::linear_attention_decode(bench.ctx, {}, part(0), part(1), part(2),
                                       {first.tensor, lengths.tensor, positions.tensor, ancestors.tensor},
                                       layer, o.tensor);
      kernels::linear_attention_commit(bench.ctx, {accepted.tensor, counts.tensor, lengths.tensor}, layer);
    }
  };
  bench.rehearse(step);
  kernels::Graph graph;
  kernels::Graph::begin(bench.ctx.stream);
  step();
  graph.end(bench.ctx.stream);
  bench.measure(state, kLayers, [&] { graph.launch(bench.ctx.stream); });
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

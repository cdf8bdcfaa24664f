// The linear layers of GPT-2 124M on a GPU: training's products against the rate of the matrix units, and
// decoding's row-invariant ones against the bandwidth at which weights are read. Every timed call is one of
// many in a captured graph, so that launching costs what it costs in a step; decoding rotates among copies of
// the weights, so that they come from memory and not from the cache.
#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <functional>
#include <memory>
#include <vector>

#include "kernels/ops/linear.h"
#include "kernels/ops/sampling.h"
#include "tests/bench/gpu_bench.h"

namespace {

using namespace gpu_bench;

constexpr Fill kSmall{.scale = 0.05};

// Times a graph in which `call` stands `calls` times; each counts as one iteration.
void time_in_graph(benchmark::State& state, int calls, const std::function<void(const Context&, int)>& call) {
  Bench bench;
  bench.measure_recorded(state, calls, [&] {
    for (int i = 0; i < calls; ++i) call(bench.ctx, i);
  });
}

enum Product { forward, forward_bias, forward_gelu, backward_input, backward_input_gelu, backward_weight };
constexpr const char* kNames[] = {"forward",        "forward bias",        "forward gelu",
                                  "backward_input", "backward_input gelu", "backward_weight"};

// One layer of (out, in) over `rows` rows. Arguments: product, rows, out, in, dtype.
void gpu_matrix_product(benchmark::State& state) {
  if (skip(state)) return;
  const int64_t rows = state.range(1), out = state.range(2), in = state.range(3);
  const auto dtype = static_cast<DType>(state.range(4));
  const Buffer x(dtype, {rows, in}), w(dtype, {out, in}, kSmall), bias(dtype, {out}), y(dtype, {rows, out}),
      pre(dtype, {rows, out}), dx(dtype, {rows, in}), dw(DType::f32, {out, in});
  // The gelu stands ahead of the layer in the backward, so its input is as wide as dx.
  const Buffer pre_in(dtype, {rows, in});
  time_in_graph(state, 10, [&](const Context& ctx, int) {
    switch (state.range(0)) {
      case forward:
        return kernels::linear(ctx, x, {w, {}, {}}, y);
      case forward_bias:
        return kernels::linear(ctx, x, {w, bias, {}}, y);
      case forward_gelu:
        return kernels::linear_gelu(ctx, x, {w, {}, {}}, pre, y);
      case backward_input:
        return kernels::linear_backward_input(ctx, y, w, dx);
      case backward_input_gelu:
        return kernels::linear_backward_input_gelu(ctx, y, w, pre_in, dx);
      default:
        return kernels::linear_backward_weight(ctx, y, x, dw);
    }
  });
  state.counters["FLOP/s"] =
      benchmark::Counter(2.0 * static_cast<double>(rows * out * in),
                         benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
  state.SetLabel(fmt::format("{} {}", kNames[state.range(0)], name_of(dtype)));
}

void training_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"product", "rows", "out", "in", "dtype"})->UseManualTime()->MinTime(0.05);
  for (DType dtype : {DType::f16, DType::bf16})
    for (auto [out, in] : {std::pair{768, 768}, {2304, 768}, {3072, 768}, {768, 3072}, {50304, 768}})
      for (Product product :
           {forward, forward_bias, forward_gelu, backward_input, backward_input_gelu, backward_weight})
        b->Args({product, 16384, out, in, static_cast<int64_t>(dtype)});
}
BENCHMARK(gpu_matrix_product)->Apply(training_shapes);

// Arguments: rows, out, in, dtype.
void gpu_decode_product(benchmark::State& state) {
  if (skip(state)) return;
  const int64_t rows = state.range(0), out = state.range(1), in = state.range(2);
  const auto dtype = static_cast<DType>(state.range(3));
  const Buffer matrix(dtype, {out, in}, kSmall), x(dtype, {rows, in}), y(dtype, {rows, out});
  const Shape panels = kernels::panels_shape(matrix);
  const int64_t bytes = panels.numel() * static_cast<int64_t>(size_of(dtype));
  constexpr int64_t kCacheBytes = int64_t{300} << 20;
  const auto copies = static_cast<size_t>(std::max<int64_t>(1, kCacheBytes / bytes));
  std::vector<std::unique_ptr<Buffer>> weights;
  for (size_t i = 0; i < copies; ++i) weights.push_back(std::make_unique<Buffer>(dtype, panels, kSmall));
  time_in_graph(state, static_cast<int>(std::max<size_t>(copies, 4)), [&](const Context& ctx, int i) {
    kernels::linear(ctx, x, {matrix, {}, *weights[static_cast<size_t>(i) % copies]}, y);
  });
  state.counters["bytes/s"] = benchmark::Counter(
      static_cast<double>(bytes), benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
  state.SetLabel(fmt::format("{}, {:.1f} MB", name_of(dtype), static_cast<double>(bytes) * 1e-6));
}

void decode_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "out", "in", "dtype"})->UseManualTime()->MinTime(0.05);
  for (auto [out, in] : {std::pair{768, 768}, {2304, 768}, {3072, 768}, {768, 3072}, {50304, 768}})
    for (int64_t rows : {1, 8, 16, 32, 64}) b->Args({rows, out, in, static_cast<int64_t>(DType::f16)});
  for (auto [out, in] : {std::pair{1600, 1600}, {6400, 1600}, {1600, 6400}})
    for (int64_t rows : {1, 32}) b->Args({rows, out, in, static_cast<int64_t>(DType::f16)});
  b->Args({1, 3072, 768, static_cast<int64_t>(DType::f32)});
}
BENCHMARK(gpu_decode_product)->Apply(decode_shapes);

// The linear layers of one decode step of GPT-2 124M, one behind the other: what a step cannot be faster
// than.
void gpu_decode_step_products(benchmark::State& state) {
  if (skip(state)) return;
  const int64_t rows = state.range(0);
  struct Layer {
    Buffer matrix, panels, x, y;
    Layer(int64_t n, int64_t out, int64_t in)
        : matrix(DType::f16, {out, in}, kSmall),
          panels(DType::f16, kernels::panels_shape(matrix), kSmall),
          x(DType::f16, {n, in}),
          y(DType::f16, {n, out}) {}
  };
  std::vector<std::unique_ptr<Layer>> layers;
  double bytes = 0;
  const auto add = [&](int64_t out, int64_t in) {
    layers.push_back(std::make_unique<Layer>(rows, out, in));
    bytes += static_cast<double>(layers.back()->panels.tensor.bytes());
  };
  for (int block = 0; block < 12; ++block)
    for (auto [out, in] : {std::pair{2304, 768}, {768, 768}, {3072, 768}, {768, 3072}}) add(out, in);
  add(50304, 768);
  time_in_graph(state, 1, [&](const Context& ctx, int) {
    for (const auto& layer : layers)
      kernels::linear(ctx, layer->x, {layer->matrix, {}, layer->panels}, layer->y);
  });
  state.counters["bytes/s"] =
      benchmark::Counter(bytes, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
}
BENCHMARK(gpu_decode_step_products)
    ->ArgName("rows")
    ->Arg(1)
    ->Arg(8)
    ->Arg(32)
    ->Arg(64)
    ->UseManualTime()
    ->MinTime(0.05);

enum Choice { argmax, probabilities, top_k };

// Arguments: what, rows, vocabulary.
void gpu_sampling(benchmark::State& state) {
  if (skip(state)) return;
  const int64_t rows = state.range(1), vocabulary = state.range(2);
  const Buffer logits(DType::f32, {rows, vocabulary}, {.scale = 3}), p(DType::f32, {rows, vocabulary});
  const Buffer tokens(DType::i32, {rows}), indices(DType::i32, {rows, 10});
  time_in_graph(state, 20, [&](const Context& ctx, int) {
    if (state.range(0) == argmax) kernels::argmax(ctx, logits, tokens);
    if (state.range(0) == probabilities) kernels::probabilities(ctx, logits, 0.8f, p);
    if (state.range(0) == top_k) kernels::top_k(ctx, logits, indices);
  });
  constexpr const char* kChoices[] = {"argmax", "probabilities", "top_k of 10"};
  state.SetLabel(kChoices[state.range(0)]);
}
BENCHMARK(gpu_sampling)
    ->ArgNames({"what", "rows", "vocabulary"})
    ->ArgsProduct({{argmax, probabilities, top_k}, {1, 32, 64}, {50304}})
    ->UseManualTime()
    ->MinTime(0.05);

}  // namespace

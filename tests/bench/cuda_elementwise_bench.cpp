// The GPU's element-wise operations against the bytes they must move: bytes_per_second counts every input
// read once and every output written once, so that it can be held against what the memory gives (`fill` and
// `cast` come first and show that).
#include <benchmark/benchmark.h>

#include <functional>
#include <vector>

#include "kernels/cuda/bias.h"
#include "kernels/ops/activation.h"
#include "kernels/ops/cast.h"
#include "kernels/ops/cross_entropy.h"
#include "kernels/ops/embedding.h"
#include "kernels/ops/norm.h"
#include "kernels/ops/optimizer.h"
#include "kernels/ops/rotary.h"
#include "tests/bench/gpu_bench.h"

namespace {

using namespace gpu_bench;

void measure(benchmark::State& state, double bytes, const std::function<void(const Context&)>& call) {
  Bench bench;
  bench.measure_recorded(state, 1, [&] { call(bench.ctx); });
  state.SetBytesProcessed(static_cast<int64_t>(bytes * static_cast<double>(state.iterations())));
}

// Arguments of all but the last two: rows, columns. fp16.
void cuda_fill(benchmark::State& state) {
  if (skip(state)) return;
  Buffer y(DType::f32, {state.range(0), state.range(1)});
  measure(state, 4.0 * state.range(0) * state.range(1),
          [&](const Context& ctx) { kernels::fill(ctx, y, 0.5f); });
}

void cuda_cast(benchmark::State& state) {
  if (skip(state)) return;
  const Shape shape{state.range(0), state.range(1)};
  Buffer x(DType::f32, shape), y(DType::f16, shape);
  measure(state, 6.0 * shape.numel(), [&](const Context& ctx) { kernels::cast(ctx, x, y); });
}

void cuda_gelu(benchmark::State& state) {
  if (skip(state)) return;
  const Shape shape{state.range(0), state.range(1)};
  Buffer x(DType::f16, shape), y(DType::f16, shape);
  measure(state, 4.0 * shape.numel(), [&](const Context& ctx) { kernels::gelu(ctx, x, y); });
}

void cuda_gelu_backward(benchmark::State& state) {
  if (skip(state)) return;
  const Shape shape{state.range(0), state.range(1)};
  Buffer dy(DType::f16, shape), x(DType::f16, shape), dx(DType::f16, shape);
  measure(state, 6.0 * shape.numel(), [&](const Context& ctx) { kernels::gelu_backward(ctx, dy, x, dx); });
}

void cuda_swiglu(benchmark::State& state) {
  if (skip(state)) return;
  const Shape shape{state.range(0), state.range(1)}, pair{state.range(0), 2 * state.range(1)};
  Buffer x(DType::f16, pair), y(DType::f16, shape);
  measure(state, 6.0 * shape.numel(), [&](const Context& ctx) { kernels::swiglu(ctx, x, y); });
}

void cuda_swiglu_backward(benchmark::State& state) {
  if (skip(state)) return;
  const Shape shape{state.range(0), state.range(1)}, pair{state.range(0), 2 * state.range(1)};
  Buffer dy(DType::f16, shape), x(DType::f16, pair), dx(DType::f16, pair);
  measure(state, 10.0 * shape.numel(), [&](const Context& ctx) { kernels::swiglu_backward(ctx, dy, x, dx); });
}

struct NormBuffers {
  Shape shape;
  Buffer x, branch, sum, y, gain, bias, statistics, dgain, dbias;
  kernels::NormParams params{.kind = kernels::NormKind::layer};
  explicit NormBuffers(const benchmark::State& state)
      : shape{state.range(0), state.range(1)},
        x(DType::f16, shape),
        branch(DType::f16, shape),
        sum(DType::f16, shape),
        y(DType::f16, shape),
        gain(DType::f16, {shape[1]}),
        bias(DType::f16, {shape[1]}),
        statistics(DType::f32, {shape[0], 1, 2}),
        dgain(DType::f32, {shape[1]}),
        dbias(DType::f32, {shape[1]}) {}
};

void cuda_norm(benchmark::State& state) {
  if (skip(state)) return;
  NormBuffers b(state);
  measure(state, 4.0 * b.shape.numel(),
          [&](const Context& ctx) { kernels::norm(ctx, b.params, b.x, b.gain, b.bias, b.y, b.statistics); });
}

void cuda_residual_norm(benchmark::State& state) {
  if (skip(state)) return;
  NormBuffers b(state);
  measure(state, 8.0 * b.shape.numel(), [&](const Context& ctx) {
    kernels::residual_norm(ctx, b.params, b.x, b.branch, b.gain, b.bias, b.sum, b.y, b.statistics);
  });
}

void cuda_norm_backward(benchmark::State& state) {
  if (skip(state)) return;
  NormBuffers b(state);
  measure(state, 8.0 * b.shape.numel(), [&](const Context& ctx) {
    kernels::norm_backward(ctx, b.params, b.branch, b.x, b.gain, b.statistics, b.sum, true, b.dgain, b.dbias);
  });
}

// The gradient of a bias: a column's sum over the rows.
void cuda_column_sums(benchmark::State& state) {
  if (skip(state)) return;
  const Shape shape{state.range(0), state.range(1)};
  Buffer dy(DType::f16, shape), sums(DType::f32, {shape[1]});
  if constexpr (kernels::kCudaEnabled)
    measure(state, 2.0 * shape.numel(),
            [&](const Context& ctx) { kernels::cuda::add_column_sums(ctx, dy, sums); });
}

// Arguments: rows, heads, head size.
void cuda_rotary(benchmark::State& state) {
  if (skip(state)) return;
  const Shape shape{state.range(0), state.range(1), state.range(2)};
  Buffer x(DType::f16, shape), positions(DType::i32, {shape[0]}, {.below = 8192});
  measure(state, 4.0 * shape.numel(),
          [&](const Context& ctx) { kernels::rotary(ctx, x, positions, 10000.0f); });
}

void cuda_embedding(benchmark::State& state) {
  if (skip(state)) return;
  const int64_t n = state.range(0), c = state.range(1);
  Buffer tokens(DType::i32, {n}, {.below = 50257}), positions(DType::i32, {n}, {.below = 1024}),
      table(DType::f16, {50304, c}), places(DType::f16, {1024, c}), y(DType::f16, {n, c});
  measure(state, 6.0 * n * c,
          [&](const Context& ctx) { kernels::embedding(ctx, tokens, table, positions, places, y); });
}

// The gradient is read for both tables; the rows of the tables it lands in are not counted.
void cuda_embedding_backward(benchmark::State& state) {
  if (skip(state)) return;
  const int64_t n = state.range(0), c = state.range(1);
  Buffer tokens(DType::i32, {n}, {.below = 50257}), positions(DType::i32, {n}, {.below = 1024}),
      table(DType::f32, {50304, c}), places(DType::f32, {1024, c}), dy(DType::f16, {n, c});
  measure(state, 4.0 * n * c, [&](const Context& ctx) {
    kernels::embedding_backward(ctx, dy, tokens, table, positions, places);
  });
}

// Arguments: rows, vocabulary, with gradient.
void cuda_cross_entropy(benchmark::State& state) {
  if (skip(state)) return;
  const int64_t n = state.range(0), v = state.range(1);
  Buffer logits(DType::f16, {n, v}), targets(DType::i32, {n}, {.below = 50257}), weights(DType::f32, {n}),
      seed(DType::f32, {1}), loss(DType::f64, {1});
  const Tensor given = state.range(2) ? Tensor(seed) : Tensor();
  measure(state, (state.range(2) ? 4.0 : 2.0) * n * v,
          [&](const Context& ctx) { kernels::cross_entropy(ctx, logits, targets, weights, given, loss); });
}

// Arguments: parameters, segments.
struct Parameters {
  Buffer weights, master, gradients, m, v, state, normaliser;
  kernels::OptimizerBuffers buffers;
  std::vector<kernels::Segment> segments;
  Parameters(int64_t count, int64_t parts)
      : weights(DType::f16, {count}),
        master(DType::f32, {count}),
        gradients(DType::f32, {count}),
        m(DType::f32, {count}),
        v(DType::f32, {count}, {.positive = true}),
        state(DType::u8, {sizeof(kernels::OptimizerState)}),
        normaliser(DType::f32, {1}),
        buffers{weights, master, gradients, m, v, state} {
    const kernels::OptimizerState start;
    kernels::copy_bytes(buffers.state.data, kDevice, &start, {}, sizeof(start));
    for (int64_t i = 0; i < parts; ++i)
      segments.push_back({.begin = count * i / parts,
                          .count = count * (i + 1) / parts - count * i / parts,
                          .decay = i % 3 == 0});
  }
};

void cuda_gradient_statistics(benchmark::State& state) {
  if (skip(state)) return;
  Parameters p(state.range(0), state.range(1));
  measure(state, 4.0 * state.range(0), [&](const Context& ctx) {
    kernels::gradient_statistics(ctx, p.segments, p.normaliser, p.buffers);
  });
}

void cuda_adamw(benchmark::State& state) {
  if (skip(state)) return;
  Parameters p(state.range(0), state.range(1));
  measure(state, 30.0 * state.range(0),
          [&](const Context& ctx) { kernels::adamw(ctx, p.segments, p.normaliser, {}, p.buffers); });
}

// GPT-2 124M's, 1.5B's and a llama-like width; tensors do not fit the cache together.
void sizes(benchmark::internal::Benchmark* b) {
  b->UseManualTime()
      ->Unit(benchmark::kMicrosecond)
      ->Args({65536, 768})
      ->Args({32768, 1600})
      ->Args({16384, 4096});
}
// Rows of a step of GPT-2 124M and 1.5B besides.
void norm_sizes(benchmark::internal::Benchmark* b) {
  sizes(b);
  b->Args({32768, 768})->Args({16384, 1600});
}
BENCHMARK(cuda_fill)->Apply(sizes);
BENCHMARK(cuda_cast)->Apply(sizes);
BENCHMARK(cuda_gelu)->Apply(sizes);
BENCHMARK(cuda_gelu_backward)->Apply(sizes);
BENCHMARK(cuda_swiglu)->Apply(sizes);
BENCHMARK(cuda_swiglu_backward)->Apply(sizes);
BENCHMARK(cuda_norm)->Apply(norm_sizes);
BENCHMARK(cuda_residual_norm)->Apply(norm_sizes);
BENCHMARK(cuda_norm_backward)->Apply(norm_sizes);
BENCHMARK(cuda_column_sums)
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Args({16384, 1600})
    ->Args({16384, 4800})
    ->Args({16384, 6400})
    ->Args({32768, 768});
BENCHMARK(cuda_embedding)->Apply(sizes);
BENCHMARK(cuda_embedding_backward)->Apply(sizes);
BENCHMARK(cuda_rotary)
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Args({65536, 12, 64})
    ->Args({32, 12, 64});
BENCHMARK(cuda_cross_entropy)
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Args({512, 50304, 1})
    ->Args({8192, 50304, 1})
    ->Args({8192, 50257, 1})
    ->Args({8192, 50304, 0});
BENCHMARK(cuda_gradient_statistics)
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Args({124475904, 148})
    ->Args({400000000, 148})
    ->Args({1557686400, 580});
BENCHMARK(cuda_adamw)
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Args({124475904, 148})
    ->Args({1557686400, 580});

}  // namespace

// Attention: training time over sequence length (where linear crosses softmax), a layer's share in training,
// and one decoding step.
#include <benchmark/benchmark.h>

#include <cstring>
#include <string>

#include "kernels/core/parallel.h"
#include "kernels/core/philox.h"
#include "kernels/ops/linear_attention.h"
#include "kernels/ops/softmax_attention.h"

namespace {

using kernels::DType;
using kernels::Tensor;

constexpr int64_t kHeads = 4, kWidth = 64;

// A tensor that owns its memory: normal values in fp16, zeros in other types.
struct Buffer {
  Tensor tensor;
  Buffer(DType dtype, kernels::Shape shape)
      : tensor(kernels::allocate_bytes({}, static_cast<size_t>(shape.numel()) * size_of(dtype)), dtype,
               shape) {
    std::memset(tensor.data, 0, tensor.bytes());
    if (dtype != DType::f16) return;
    for (int64_t i = 0; i < tensor.numel(); ++i)
      tensor.as<kernels::f16>()[i] =
          kernels::f16(kernels::normal(1, kernels::Purpose::test, static_cast<uint64_t>(i)));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { kernels::free_bytes({}, tensor.data); }
};

struct Training {
  Buffer qkv, o, statistics, boundaries, dqkv;
  Tensor q, k, v, dq, dk, dv;
  Training(int64_t sequences, int64_t length)
      : qkv(DType::f16, {sequences * length, 3 * kHeads * kWidth}),
        o(DType::f16, {sequences * length, kHeads, kWidth}),
        statistics(DType::f32, {sequences * length, kHeads}),
        boundaries(DType::i32, {sequences + 1}),
        dqkv(DType::f16, qkv.tensor.shape) {
    for (int64_t s = 0; s <= sequences; ++s)
      boundaries.tensor.as<int32_t>()[s] = static_cast<int32_t>(s * length);
    const auto part = [&](Buffer& x, int64_t i) {
      return x.tensor.columns(i * kHeads * kWidth, kHeads * kWidth).view({x.tensor.rows(), kHeads, kWidth});
    };
    q = part(qkv, 0), k = part(qkv, 1), v = part(qkv, 2);
    dq = part(dqkv, 0), dk = part(dqkv, 1), dv = part(dqkv, 2);
  }
  void forward(bool linear) {
    linear ? kernels::linear_attention({}, {}, q, k, v, boundaries.tensor, o.tensor, statistics.tensor)
           : kernels::softmax_attention({}, q, k, v, boundaries.tensor, o.tensor, statistics.tensor);
  }
  // The output stands for its own gradient.
  void backward(bool linear) {
    const Tensor &y = o.tensor, &s = statistics.tensor, &b = boundaries.tensor;
    linear ? kernels::linear_attention_backward({}, {}, y, q, k, v, y, s, b, dq, dk, dv)
           : kernels::softmax_attention_backward({}, y, q, k, v, y, s, b, dq, dk, dv);
  }
};

// Arguments: linear, backward, sequences, length.
void train(benchmark::State& state) {
  const bool linear = state.range(0) != 0, backward = state.range(1) != 0;
  kernels::set_threads(1);
  Training t(state.range(2), state.range(3));
  t.forward(linear);
  for (auto _ : state) backward ? t.backward(linear) : t.forward(linear);
  state.SetLabel(std::string(linear ? "linear" : "softmax") + (backward ? " backward" : " forward"));
  const double tokens = static_cast<double>(state.range(2) * state.range(3));
  state.counters["ns_per_token"] = benchmark::Counter(
      tokens * 1e-9, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}
BENCHMARK(train)
    ->ArgNames({"linear", "backward", "sequences", "length"})
    ->ArgsProduct({{0, 1}, {0, 1}, {1}, {64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384}})
    ->ArgsProduct({{0, 1}, {0, 1}, {8}, {256}})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

// Arguments: linear, rows of the step, committed tokens, threads.
void decode(benchmark::State& state) {
  const bool linear = state.range(0) != 0;
  const int64_t rows = state.range(1), length = state.range(2);
  kernels::set_threads(static_cast<int>(state.range(3)));
  Buffer q(DType::f16, {rows, kHeads, kWidth}), k(DType::f16, q.tensor.shape), o(DType::f16, q.tensor.shape);
  const kernels::Shape cache = {1, linear ? 2 * kernels::kFold : length + 64, kHeads, kWidth};
  Buffer cache_k(linear ? DType::f32 : DType::f16, cache), cache_v(DType::f16, cache);
  Buffer s(DType::f32, {1, kHeads, kWidth, kWidth}), z(DType::f32, {1, kHeads, kWidth});
  kernels::LinearAttentionState folded{s.tensor, z.tensor, cache_k.tensor, cache_v.tensor};
  Buffer first(DType::i32, {2}), lengths(DType::i32, {1}), positions(DType::i32, {rows}),
      masks(DType::i64, {rows});
  first.tensor.as<int32_t>()[1] = static_cast<int32_t>(rows);
  lengths.tensor.as<int32_t>()[0] = static_cast<int32_t>(length);
  for (int64_t i = 0; i < rows; ++i) masks.tensor.as<int64_t>()[i] = (int64_t{2} << i) - 1;
  const kernels::DecodeRows step{first.tensor, lengths.tensor, positions.tensor, masks.tensor};
  for (auto _ : state)
    if (linear) {
      kernels::linear_attention_decode({}, {}, q.tensor, k.tensor, k.tensor, step, folded, o.tensor);
    } else {
      kernels::softmax_attention_decode({}, q.tensor, k.tensor, k.tensor, step, cache_k.tensor,
                                        cache_v.tensor, o.tensor);
    }
  state.SetLabel(linear ? "linear" : "softmax");
}
BENCHMARK(decode)
    ->ArgNames({"linear", "rows", "length", "threads"})
    ->ArgsProduct({{0}, {1, 2, 3, 4, 5, 8, 16, 64}, {256}, {1, 2}})
    ->ArgsProduct({{1}, {1, 2, 3, 4, 5, 8, 16}, {288}, {1, 2}})
    ->Unit(benchmark::kMicrosecond)
    ->UseRealTime();

}  // namespace

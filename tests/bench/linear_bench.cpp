// Matrix products of the quickstart model in training, and the row-invariant products of a decode step
// against the bandwidth at which this machine reads memory.
#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <array>
#include <chrono>
#include <map>
#include <memory>
#include <vector>

#include "kernels/core/device.h"
#include "kernels/core/parallel.h"
#include "kernels/core/philox.h"
#include "kernels/ops/cast.h"
#include "kernels/ops/linear.h"

namespace {

using kernels::DType;
using kernels::Shape;
using kernels::Tensor;

// Normal values in any type.
class Buffer {
 public:
  Buffer(DType dtype, Shape shape, double scale = 1)
      : data_(kernels::allocate_bytes({}, static_cast<size_t>(shape.numel()) * sizeof(float)), Free{}),
        tensor_(data_.get(), dtype, shape) {
    static const std::vector<float> normals = [] {
      std::vector<float> x(4096);
      for (size_t i = 0; i < x.size(); ++i) x[i] = kernels::normal(1, kernels::Purpose::test, i);
      return x;
    }();
    std::vector<float> values(static_cast<size_t>(shape.numel()));
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = static_cast<float>(scale) * normals[i % normals.size()];
    kernels::cast({}, Tensor(values.data(), DType::f32, shape), tensor_);
  }
  operator const Tensor&() const { return tensor_; }

 private:
  struct Free {
    void operator()(void* p) const { kernels::free_bytes({}, p); }
  };
  std::unique_ptr<void, Free> data_;
  Tensor tensor_;
};

enum Product { forward, backward_input, backward_weight };

// One layer of (out, in) over `rows` rows. Arguments: product, rows, out, in, dtype, threads.
void matrix_product(benchmark::State& state) {
  const int64_t rows = state.range(1), out = state.range(2), in = state.range(3);
  const auto dtype = static_cast<DType>(state.range(4));
  kernels::set_threads(static_cast<int>(state.range(5)));
  Buffer x(dtype, {rows, in}), w(dtype, {out, in}, 0.05), y(dtype, {rows, out}), dw(DType::f32, {out, in});
  for (auto _ : state) {
    if (state.range(0) == forward) kernels::linear({}, x, {w, {}, {}}, y);
    if (state.range(0) == backward_input) kernels::linear_backward_input({}, y, w, x);
    if (state.range(0) == backward_weight) kernels::linear_backward_weight({}, y, x, dw);
  }
  state.counters["FLOP/s"] = benchmark::Counter(
      2.0 * rows * out * in, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
  state.SetLabel(fmt::format("{} {}",
                             state.range(0) == forward          ? "forward"
                             : state.range(0) == backward_input ? "backward_input"
                                                                : "backward_weight",
                             name_of(dtype)));
}

void training_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"product", "rows", "out", "in", "dtype", "threads"})->UseRealTime();
  for (int64_t threads : {1, 2})
    for (DType dtype : {DType::f16, DType::bf16, DType::f32})
      for (auto [out, in] : {std::pair{768, 256}, {1408, 256}, {256, 704}, {2048, 256}})
        for (Product product : {forward, backward_input, backward_weight})
          b->Args({product, 2048, out, in, static_cast<int64_t>(dtype), threads});
}
BENCHMARK(matrix_product)->Apply(training_shapes);

// How fast the team reads memory: the yardstick for decoding. Arguments: MiB, threads.
void read_memory(benchmark::State& state) {
  kernels::set_threads(static_cast<int>(state.range(1)));
  const int64_t bytes = state.range(0) << 20, words = bytes / 8;
  Buffer buffer(DType::f32, {bytes / 4});
  const auto* data = static_cast<const uint64_t*>(static_cast<const Tensor&>(buffer).data);
  for (auto _ : state)
    kernels::parallel_for(words, 1024, [&](int64_t begin, int64_t end) {
      uint64_t sums[32] = {};
      for (int64_t i = begin; i < end; i += 32)
        for (int64_t j = 0; j < 32; ++j) sums[j] ^= data[i + j];
      for (uint64_t s : sums) benchmark::DoNotOptimize(s);
    });
  state.SetBytesProcessed(state.iterations() * bytes);
}
BENCHMARK(read_memory)->ArgNames({"MiB", "threads"})->ArgsProduct({{1, 6, 24, 512}, {1, 2}})->UseRealTime();

// What handing work to the team and waiting for it costs; a decode step does so some twenty times.
void empty_region(benchmark::State& state) {
  kernels::set_threads(static_cast<int>(state.range(0)));
  for (auto _ : state) kernels::parallel_region([](int, int) {});
}
BENCHMARK(empty_region)->ArgName("threads")->Arg(2)->Arg(4)->UseRealTime();

struct Model {
  int64_t width, layers, ffn, vocabulary;
};
constexpr Model kModels[] = {{256, 4, 704, 2048}, {512, 8, 1408, 4096}, {2048, 8, 5632, 16384}};

// The linear layers of one decode step with n rows: q, k, v; output; gate and up; down; vocabulary.
class DecodeLayers {
 public:
  explicit DecodeLayers(const Model& m, DType dtype) {
    for (int64_t layer = 0; layer < m.layers; ++layer)
      for (auto [out, in] :
           {std::pair{3 * m.width, m.width}, {m.width, m.width}, {2 * m.ffn, m.width}, {m.width, m.ffn}})
        add(dtype, out, in);
    add(dtype, m.vocabulary, m.width);
  }
  void step(int64_t rows) const {
    for (const Layer& layer : layers_)
      kernels::linear({}, static_cast<const Tensor&>(*layer.x).slice(0, rows),
                      {layer.matrix, {}, *layer.panels}, static_cast<const Tensor&>(*layer.y).slice(0, rows));
  }
  int64_t bytes() const { return bytes_; }

 private:
  struct Layer {
    Tensor matrix;
    std::unique_ptr<Buffer> x, y, panels;
  };
  void add(DType dtype, int64_t out, int64_t in) {
    Buffer matrix(dtype, {out, in}, 0.05);
    Layer layer{.matrix = matrix,
                .x = std::make_unique<Buffer>(dtype, Shape{64, in}),
                .y = std::make_unique<Buffer>(dtype, Shape{64, out}),
                .panels = std::make_unique<Buffer>(dtype, kernels::panels_shape(matrix))};
    Tensor panels = *layer.panels;
    kernels::pack_panels({}, matrix, panels);
    layer.matrix.data = panels.data;  // only its shape is read when panels are present
    bytes_ += static_cast<int64_t>(panels.bytes());
    layers_.push_back(std::move(layer));
  }
  std::vector<Layer> layers_;
  int64_t bytes_ = 0;
};

// Arguments: model, dtype, threads, rows. T(n)/T(1) is taken against the run with one row before it.
void decode_step(benchmark::State& state) {
  kernels::set_threads(static_cast<int>(state.range(2)));
  const Model& model = kModels[state.range(0)];
  const auto dtype = static_cast<DType>(state.range(1));
  const DecodeLayers layers(model, dtype);
  layers.step(state.range(3));
  const auto start = std::chrono::steady_clock::now();
  for (auto _ : state) layers.step(state.range(3));
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  static std::map<std::array<int64_t, 3>, double> single_row;
  const double time = elapsed.count() / static_cast<double>(state.iterations());
  double& one = single_row[{state.range(0), state.range(1), state.range(2)}];
  if (state.range(3) == 1) one = time;
  state.counters["T(n)/T(1)"] = time / one;
  state.SetBytesProcessed(state.iterations() * layers.bytes());
  state.SetLabel(fmt::format("width {} x {} layers, {}, {:.1f} MB", model.width, model.layers, name_of(dtype),
                             static_cast<double>(layers.bytes()) * 1e-6));
}

void decode_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"model", "dtype", "threads", "rows"})->UseRealTime();
  for (int64_t model : {0, 1, 2})
    for (int64_t threads : {1, 2})
      for (int64_t rows : {1, 2, 3, 4, 5, 6, 8, 16, 32, 64}) b->Args({model, 0, threads, rows});
}
BENCHMARK(decode_step)->Apply(decode_shapes);

}  // namespace

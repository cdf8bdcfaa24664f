// One decoding step of the large presets on a GPU at batch 1: the model over `rows` new tokens, the choice of
// tokens, the commit, as the host waits for them. rows 1 is plain decoding, more are verification. Steps run
// as recorded graphs, or eagerly for comparison. GB/s counts the weights that a step reads once. The peer is
// the decode section of peers/pytorch_gpu.py.
#include "tests/bench/gpu_bench.h"
#include "trainer/decode/decoder.h"
#include "trainer/optim/settings.h"

namespace {

constexpr int64_t kVocabulary = 50304;
constexpr int64_t kLength = 512;  // committed tokens

// Argument: rows.
void gpu_decode(benchmark::State& state, const std::string& preset, bool graph) {
  if (gpu_bench::skip(state)) return;
  configs::Config config =
      configs::load_config(std::string(FORETELL_SOURCE) + "/configs/presets/" + preset + ".cfg", {});
  config.train.graph = graph;
  const kernels::Device gpu = gpu_bench::kDevice;
  const kernels::OwnedStream stream(gpu);
  const kernels::Context ctx{.device = gpu, .stream = stream.get()};
  trainer::Model model(config, kVocabulary);
  model.parameters().allocate(gpu, trainer::compute_dtype(config), false);
  model.parameters().initialize(ctx, 1);
  model.prepare_decoding(ctx);
  trainer::Decoder decoder(ctx, model, 1, 1024);
  const trainer::DecodeSettings greedy;
  decoder.measure_step(state.range(0), kLength, 20, greedy);
  for (auto _ : state) state.SetIterationTime(decoder.measure_step(state.range(0), kLength, 1, greedy));
  state.SetLabel(kernels::describe(gpu));
  state.counters["GB/s"] = benchmark::Counter(static_cast<double>(model.decode_weight_bytes()) / 1e9,
                                              benchmark::Counter::kIsIterationInvariantRate);
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgName("rows")->Arg(1)->Arg(8)->Arg(32)->Arg(64);
  b->UseManualTime()->Unit(benchmark::kMillisecond)->MinTime(0.2);
}
BENCHMARK_CAPTURE(gpu_decode, gpt2_124m, "gpt2_124m", true)->Apply(shapes);
BENCHMARK_CAPTURE(gpu_decode, linear_124m, "linear_124m", true)->Apply(shapes);
BENCHMARK_CAPTURE(gpu_decode, gpt2_124m_eager, "gpt2_124m", false)->Apply(shapes);
BENCHMARK_CAPTURE(gpu_decode, linear_124m_eager, "linear_124m", false)->Apply(shapes);

}  // namespace

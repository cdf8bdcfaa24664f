// Optimizer steps of one rank, on random tokens: forward, every head, backward, AdamW. On the CPU the
// quickstart model, whose peer is peers/pytorch_train.py with the same shapes and threads; on a GPU the large
// presets.
#include "kernels/core/parallel.h"
#include "tests/bench/gpu_bench.h"
#include "tests/support/step_run.h"
#include "tests/support/temporary_folder.h"
#include "trainer/train/loop.h"

namespace {

configs::Config preset(const std::string& name, const std::filesystem::path& folder) {
  configs::Config c =
      configs::load_config(std::string(FORETELL_SOURCE) + "/configs/presets/" + name + ".cfg", {});
  c.data.path = (folder / "data").string();
  return c;
}

void count(benchmark::State& state, double tokens) {
  state.counters["tokens_per_second"] = benchmark::Counter(tokens, benchmark::Counter::kIsRate);
}

void training_step(benchmark::State& state, const std::string& compute) {
  constexpr int64_t kVocabulary = 1024;
  const support::TemporaryFolder folder;
  configs::Config config = preset("quickstart", folder.path());
  config.train.batch = config.train.micro_batch = 8;  // one micro-batch a step, as the peer
  config.precision.compute = compute;
  support::write_random_tokens(config.data.path, kVocabulary, 40, 16 * config.model.context + 1);
  kernels::set_threads(static_cast<int>(state.range(0)));
  support::StepRun run(config, kVocabulary, {});
  run.steps(1);
  double tokens = 0;
  for (auto _ : state) tokens += run.steps(1).front().tokens;
  count(state, tokens);
}

// Arguments: sequences in a step, tokens in a sequence. One iteration is several steps and waits for the
// last: inside, the device never waits.
void gpu_step(benchmark::State& state, const std::string& name, const std::string& compute) {
  if (gpu_bench::skip(state)) return;
  constexpr int64_t kVocabulary = 50304;
  constexpr int kSteps = 10;
  const support::TemporaryFolder folder;
  configs::Config config = preset(name, folder.path());
  config.train.batch = config.train.micro_batch = state.range(0);
  config.model.context = state.range(1);
  config.precision.compute = compute;
  support::write_random_tokens(config.data.path, kVocabulary, 64, 4 * config.model.context + 1);
  const kernels::Device gpu = gpu_bench::kDevice;
  const kernels::OwnedStream stream(gpu);
  state.SetLabel(kernels::describe(gpu));
  const kernels::Context ctx{gpu, stream.get(), nullptr, false};
  const trainer::Plan plan = trainer::plan_memory(config, kVocabulary, 1, ctx);
  if (!plan.problem.empty()) return state.SkipWithError(plan.problem.c_str());
  support::StepRun run(config, kVocabulary, ctx);
  run.steps(4);
  double tokens = 0;
  for (auto _ : state)
    for (const auto& metrics : run.steps(kSteps)) tokens += metrics.tokens;
  count(state, tokens);
  state.counters["ms_per_step"] =
      benchmark::Counter(static_cast<double>(state.iterations()) * kSteps / 1e3,
                         benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
  const kernels::DeviceMemory memory = kernels::memory_of(gpu);
  state.counters["planned_gib"] = static_cast<double>(plan.total_bytes) / (1 << 30);
  state.counters["memory_gib"] = static_cast<double>(memory.total - memory.free) / (1 << 30);
}

void several_seconds(benchmark::internal::Benchmark* b) {
  b->Unit(benchmark::kMillisecond)->UseRealTime()->MinTime(5);
}
BENCHMARK_CAPTURE(training_step, fp16, "fp16")->Arg(1)->Arg(2)->Apply(several_seconds);
BENCHMARK_CAPTURE(training_step, fp32, "fp32")->Arg(1)->Arg(2)->Apply(several_seconds);
BENCHMARK_CAPTURE(gpu_step, gpt2_124m, "gpt2_124m", "fp16")->Args({32, 1024})->Apply(several_seconds);
BENCHMARK_CAPTURE(gpu_step, gpt2_124m_bf16, "gpt2_124m", "bf16")->Args({32, 1024})->Apply(several_seconds);
BENCHMARK_CAPTURE(gpu_step, gpt2_1558m, "gpt2_1558m", "fp16")->Args({16, 1024})->Apply(several_seconds);
BENCHMARK_CAPTURE(gpu_step, linear_124m, "linear_124m", "fp16")->Args({4, 8192})->Apply(several_seconds);

}  // namespace

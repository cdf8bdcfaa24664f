// One optimizer step of the quickstart model on one rank: forward, every head, backward, AdamW. The peer is
// peers/pytorch_train.py with the same shapes and threads.
#include <benchmark/benchmark.h>

#include <fstream>

#include "data/prepare.h"
#include "kernels/core/parallel.h"
#include "tests/support/tiny_run.h"
#include "trainer/optim/settings.h"
#include "trainer/train/step.h"

namespace {

constexpr int64_t kVocabulary = 2048;

configs::Config quickstart_shapes(const std::filesystem::path& folder, const std::string& compute) {
  configs::Config c =
      configs::load_config(std::string(FORETELL_SOURCE) + "/configs/presets/quickstart.cfg", {});
  c.train.batch = c.train.micro_batch = 8;  // one micro-batch a step, as the peer
  c.precision.compute = compute;
  c.data.path = (folder / "data").string();
  return c;
}

// Documents long enough that every sample fills the context.
void prepare_long_documents(const std::filesystem::path& folder) {
  std::filesystem::create_directories(folder / "text");
  for (int d = 0; d < 40; ++d) {
    std::ofstream out(folder / "text" / (std::to_string(d) + ".txt"));
    for (int w = 0; w < 4000; ++w) out << (d * 7919 + w * 104729) % 1000 << (w % 12 ? ' ' : '\n');
  }
  data::PrepareParams params;
  params.inputs = {(folder / "text").string()};
  params.output = folder / "data";
  params.tokenizer = "bytes";
  data::prepare(params, [](const std::string&, double) {});
}

void training_step(benchmark::State& state, const std::string& compute) {
  support::TemporaryFolder folder;
  prepare_long_documents(folder.path());
  kernels::set_threads(static_cast<int>(state.range(0)));
  const configs::Config config = quickstart_shapes(folder.path(), compute);
  const data::TokenDataset dataset(config.data.path, "train", config.model.context);
  trainer::Model model(config, kVocabulary);
  const data::BatchLoader loader(
      dataset, {1, config.train.batch, config.train.micro_batch, config.model.context, model.offsets()});
  const auto ranks = comm::make_local_communicator();
  const kernels::Context ctx;
  model.parameters().allocate(ctx.device, trainer::compute_dtype(config), true);
  model.parameters().initialize(ctx, 1);
  trainer::Stepper stepper(config, model, loader, *ranks, ctx);
  model.parameters().refresh_weights(ctx);
  stepper.run(false);
  double tokens = 0;
  for (auto _ : state) tokens += stepper.run(false).tokens;
  state.counters["tokens_per_second"] = benchmark::Counter(tokens, benchmark::Counter::kIsRate);
}

BENCHMARK_CAPTURE(training_step, fp16, "fp16")
    ->Arg(1)
    ->Arg(2)
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime()
    ->MinTime(5);
BENCHMARK_CAPTURE(training_step, fp32, "fp32")
    ->Arg(1)
    ->Arg(2)
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime()
    ->MinTime(5);

}  // namespace

// step_batches CONFIG OUT STEPS [section.key=value...]
// Writes what the first steps of a training run learn from, for programs that are to learn from the same:
// int32 (STEPS, train.batch, model.context + 1), the samples of each step, padded with -1.
#include <fmt/format.h>

#include <fstream>

#include "configs/config.h"
#include "data/batch_loader.h"
#include "kernels/core/error.h"

namespace {

void write_steps(const configs::Config& config, const std::string& path, int64_t steps) {
  const data::TokenDataset dataset(config.data.path, "train", config.model.context);
  const data::BatchLoader loader(dataset, {static_cast<uint64_t>(config.train.seed), config.train.batch,
                                           config.train.micro_batch, config.model.context, 1});
  std::ofstream out(path, std::ios::binary);
  for (int64_t step = 0; step < steps; ++step)
    for (const std::vector<int64_t>& samples : loader.plan(step).micro_batches)
      for (const int64_t sample : samples) {
        if (!dataset.weights(sample).empty())
          throw kernels::DataError(config.data.path + ": has tokens that are not learned; give plain text");
        std::vector<int32_t> tokens = dataset.sample(sample);
        tokens.resize(static_cast<size_t>(config.model.context) + 1, -1);
        out.write(reinterpret_cast<const char*>(tokens.data()),
                  static_cast<std::streamsize>(tokens.size() * sizeof(int32_t)));
      }
  if (!out.flush()) throw kernels::DataError("cannot write " + path);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 4) {
    fmt::print(stderr, "usage: step_batches CONFIG OUT STEPS [section.key=value...]\n");
    return 2;
  }
  write_steps(configs::load_config(argv[1], std::vector<std::string>(argv + 4, argv + argc)), argv[2],
              std::stoll(argv[3]));
  return 0;
} catch (const std::exception& e) {
  fmt::print(stderr, "step_batches: {}\n", e.what());
  return 1;
}

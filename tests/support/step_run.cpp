#include "tests/support/step_run.h"

#include <cmath>
#include <filesystem>
#include <fstream>

#include "data/dataset_description.h"
#include "data/formats/shard.h"
#include "data/tokenizer.h"
#include "kernels/core/philox.h"
#include "trainer/optim/settings.h"

namespace support {

namespace fs = std::filesystem;

void write_random_tokens(const fs::path& folder, int64_t vocabulary, int64_t documents, int64_t length) {
  fs::create_directories(folder);
  const auto tokenizer = data::make_byte_tokenizer();
  data::ShardContent content;
  content.info.tokenizer_hash = tokenizer->hash();
  content.info.vocabulary = vocabulary;
  for (int64_t d = 0; d < documents; ++d) {
    for (int64_t i = 0; i < length; ++i) {
      const float u = kernels::uniform(5, kernels::Purpose::test, static_cast<uint64_t>(d * length + i));
      content.tokens.push_back(static_cast<int32_t>(static_cast<float>(vocabulary) * u * u * u));
    }
    content.documents.push_back(static_cast<int64_t>(content.tokens.size()));
    content.names.push_back("random");
  }
  content.info.bytes = content.info.predicted_bytes = static_cast<int64_t>(content.tokens.size());
  data::write_shard(folder / "train_000.h5", content);
  std::ofstream(folder / data::kTokenizerFile) << tokenizer->serialized();
  data::DatasetDescription description{tokenizer->hash(), vocabulary, {}};
  description.splits["train"] = {{"train_000.h5"}, documents, documents * length, documents * length};
  std::ofstream(folder / data::kDescriptionFile) << data::write_description(description);
}

StepRun::StepRun(const configs::Config& config, int64_t vocabulary, const kernels::Context& ctx,
                 std::optional<size_t> late, std::unique_ptr<comm::Communicator> ranks)
    : config_(config),
      dataset_(config.data.path, "train", config.model.context),
      model_(config_, vocabulary),
      loader_(dataset_, {static_cast<uint64_t>(config.train.seed), config.train.batch,
                         config.train.micro_batch, config.model.context, model_.offsets()}),
      ranks_(std::move(ranks)) {
  model_.parameters().allocate(ctx.device, trainer::compute_dtype(config), true);
  model_.parameters().initialize(ctx, static_cast<uint64_t>(config.train.seed));
  stepper_ = std::make_unique<trainer::Stepper>(config_, model_, loader_, *ranks_, ctx, late);
}

std::vector<trainer::StepMetrics> StepRun::steps(int count) {
  std::vector<trainer::StepMetrics> all;
  for (int i = 0; i < count; ++i)
    if (auto metrics = stepper_->run(false)) all.push_back(*metrics);
  while (auto metrics = stepper_->flush()) all.push_back(*metrics);
  return all;
}

std::vector<double> StepRun::losses(const std::vector<trainer::StepMetrics>& metrics) {
  std::vector<double> losses;
  for (const auto& m : metrics) losses.push_back(m.losses.front());
  return losses;
}

std::vector<char> StepRun::master() const {
  const kernels::Tensor& master = model_.parameters().buffers().master;
  std::vector<char> bytes(master.bytes());
  kernels::copy_bytes(bytes.data(), {}, master.data, master.device, bytes.size());
  return bytes;
}

}  // namespace support

#pragma once
// Training steps without a job around them: random tokens, a model, its loader and its stepper.
#include <memory>
#include <optional>
#include <vector>

#include "comm/communicator.h"
#include "configs/config.h"
#include "data/batch_loader.h"
#include "data/dataset.h"
#include "trainer/model/model.h"
#include "trainer/train/step.h"

namespace support {

// A prepared folder of documents of `length` tokens each, drawn at random from `vocabulary` (small numbers
// more often, so that there is something to learn); there is no tokenizer for them.
void write_random_tokens(const std::filesystem::path& folder, int64_t vocabulary, int64_t documents,
                         int64_t length);

class StepRun {
 public:
  // Trains on config.data.path. The context's stream must outlive this.
  StepRun(const configs::Config& config, int64_t vocabulary, const kernels::Context& ctx,
          std::optional<size_t> late = {},
          std::unique_ptr<comm::Communicator> ranks = comm::make_local_communicator());
  // Makes steps and waits for them.
  std::vector<trainer::StepMetrics> steps(int count);
  trainer::Stepper& stepper() { return *stepper_; }
  trainer::Model& model() { return model_; }
  // Loss of the language model in each step.
  static std::vector<double> losses(const std::vector<trainer::StepMetrics>& metrics);
  std::vector<char> master() const;  // bytes of the fp32 weights

 private:
  const configs::Config config_;
  data::TokenDataset dataset_;
  trainer::Model model_;
  data::BatchLoader loader_;
  std::unique_ptr<comm::Communicator> ranks_;
  std::unique_ptr<trainer::Stepper> stepper_;
};

}  // namespace support

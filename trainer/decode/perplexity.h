#pragma once
// The language model's loss over held-out text.
#include <cstdint>
#include <optional>
#include <vector>

#include "data/dataset.h"
#include "trainer/model/load.h"

namespace trainer {

struct Perplexity {
  int64_t tokens = 0;     // predicted: the sum of their loss weights
  double loss = 0;        // nats per predicted token
  double perplexity = 0;  // exp(loss)
  // Of the text behind the tokens; none where loss weights leave tokens out, whose bytes cannot be told
  // apart.
  std::optional<double> bits_per_byte;
  std::vector<double> losses;  // of every head, in the order of Model::losses
};
// One pass over the dataset, or over `max_batches` of its micro-batches, spread over all lengths of samples;
// 0 takes all.
Perplexity measure_perplexity(const Context& ctx, const LoadedModel& loaded,
                              const data::TokenDataset& dataset, int64_t max_batches);

}  // namespace trainer

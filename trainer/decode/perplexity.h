#pragma once
// The language model's loss over held-out text.
#include <cstdint>

#include "data/dataset.h"
#include "trainer/model/load.h"

namespace trainer {

struct Perplexity {
  int64_t tokens = 0;          // predicted
  double loss = 0;             // nats per predicted token
  double perplexity = 0;       // exp(loss)
  double bits_per_byte = 0;    // of the text behind the tokens
  std::vector<double> losses;  // of every head, in the order of Model::losses
};
// One pass over the dataset, or over `max_batches` of its micro-batches, spread over all lengths of samples;
// 0 takes all.
Perplexity measure_perplexity(const Context& ctx, const LoadedModel& loaded,
                              const data::TokenDataset& dataset, int64_t max_batches);

}  // namespace trainer

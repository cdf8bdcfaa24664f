#pragma once
// Which tokens form a step, as a pure function of (seed, step, global batch), never of the number of ranks.
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "data/dataset.h"

namespace data {

// N rows of several sequences laid end to end. Rows beyond the last real token pad the count to a row bucket;
// they are sequences of their own, each at most `context` long, of token 0, target -1 and weight 0.
struct Batch {
  std::vector<int32_t> tokens;      // (N)
  std::vector<int32_t> positions;   // (N) from 0 in each sequence
  std::vector<int32_t> cu_seqlens;  // (S + 1) first row of each sequence
  int64_t offsets = 1;              // K
  std::vector<int32_t>
      targets;                 // (K, N): the token k + 1 places after row i in its sequence, -1 past its end
  std::vector<float> weights;  // (K, N): loss weight of that token, 0 past the end
  int64_t max_length = 0;      // longest sequence
  int64_t rows() const { return static_cast<int64_t>(tokens.size()); }
};

struct LoaderParams {
  uint64_t seed = 1;
  int64_t batch = 32;       // sequences in a step
  int64_t micro_batch = 8;  // sequences in a micro-batch
  int64_t context = 256;    // rows of the longest sequence
  int64_t offsets = 1;      // K: 1 + the furthest head's extra offset
};

// The finite set of row counts a micro-batch can have, ascending; the last is the largest.
std::vector<int64_t> row_buckets(const LoaderParams& params);
// The most sequences a micro-batch can have, those that pad it included.
int64_t max_sequences(const LoaderParams& params);

// The samples of one step, grouped into micro-batches by length (counting sort into length buckets),
// identical on every rank. Rank r of W computes micro_batches [r M / W, (r + 1) M / W); short and long ones
// alternate, so that these parts are about equal work.
struct StepPlan {
  std::vector<std::vector<int64_t>> micro_batches;  // sample numbers
  std::vector<double> weight_sums;                  // (K): total loss weight of the step for each offset
};

class BatchLoader {
 public:
  BatchLoader(const TokenDataset& dataset, const LoaderParams& params);
  // Samples are drawn without replacement within an epoch; the order of each epoch is a keyed permutation
  // that can be evaluated at any position, so resuming needs nothing but the step.
  StepPlan plan(int64_t step) const;
  Batch load(std::span<const int64_t> samples) const;
  // Every sample once, sorted by length bucket and then in storage order: for validation.
  std::vector<std::vector<int64_t>> all_micro_batches() const;
  // At most `most` of them, the middles of as many equal parts, so that short and long samples are there in
  // proportion; the same ones on every call. 0 takes all.
  std::vector<std::vector<int64_t>> some_micro_batches(int64_t most) const;
  std::vector<int64_t> row_buckets() const { return data::row_buckets(params_); }
  const LoaderParams& params() const { return params_; }

 private:
  std::vector<std::vector<int64_t>> group(const std::vector<int64_t>& samples) const;
  const TokenDataset& dataset_;
  LoaderParams params_;
};

}  // namespace data

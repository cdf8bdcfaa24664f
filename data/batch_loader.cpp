#include "data/batch_loader.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <numeric>

#include "data/permutation.h"
#include "data/sorting.h"
#include "kernels/core/error.h"

namespace data {

namespace {

constexpr int64_t kLengthBuckets = 64, kRowBuckets = 8, kRowMultiple = 64;

int64_t ceil_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Position i of the order that visits 0, 1/2, 1/4, 3/4, ...: any contiguous part of it holds items from all
// over the sorted sequence, so that ranks that take contiguous parts get equal work.
std::vector<int64_t> spread_order(int64_t count) {
  const int bits = std::bit_width(static_cast<uint64_t>(std::max<int64_t>(count - 1, 0)));
  std::vector<int64_t> order;
  for (int64_t i = 0; i < (int64_t{1} << bits); ++i) {
    int64_t reversed = 0;
    for (int b = 0; b < bits; ++b) reversed |= (i >> b & 1) << (bits - 1 - b);
    if (reversed < count) order.push_back(reversed);
  }
  return order;
}

// Appends one sequence; weights may be empty.
void append(Batch& batch, const std::vector<int32_t>& tokens, const std::vector<float>& weights,
            int64_t total) {
  const auto length = static_cast<int64_t>(tokens.size()) - 1, begin = batch.rows();
  for (int64_t i = 0; i < length; ++i) {
    batch.tokens.push_back(tokens[i]);
    batch.positions.push_back(static_cast<int32_t>(i));
    for (int64_t k = 0; k < batch.offsets && i + k + 1 <= length; ++k) {
      batch.targets[k * total + begin + i] = tokens[i + k + 1];
      batch.weights[k * total + begin + i] = weights.empty() ? 1.0f : weights[i + k + 1];
    }
  }
  batch.cu_seqlens.push_back(static_cast<int32_t>(begin + length));
  batch.max_length = std::max(batch.max_length, length);
}

// Rows that fill the bucket, as sequences of their own that no position table is too short for.
void pad(Batch& batch, int64_t total, int64_t context) {
  while (batch.rows() < total) {
    const int64_t length = std::min(context, total - batch.rows());
    for (int64_t i = 0; i < length; ++i) {
      batch.tokens.push_back(0);
      batch.positions.push_back(static_cast<int32_t>(i));
    }
    batch.cu_seqlens.push_back(static_cast<int32_t>(batch.rows()));
    batch.max_length = std::max(batch.max_length, length);
  }
}

}  // namespace

std::vector<int64_t> row_buckets(const LoaderParams& params) {
  const int64_t largest = ceil_to(params.micro_batch * params.context, kRowMultiple);
  std::vector<int64_t> buckets;
  for (int64_t b = 1; b <= kRowBuckets; ++b) {
    const int64_t rows =
        std::min(ceil_to((largest * b + kRowBuckets - 1) / kRowBuckets, kRowMultiple), largest);
    if (buckets.empty() || rows > buckets.back()) buckets.push_back(rows);
  }
  return buckets;
}

int64_t max_sequences(const LoaderParams& params) {
  const std::vector<int64_t> buckets = row_buckets(params);
  int64_t padding = buckets.front();
  for (size_t i = 1; i < buckets.size(); ++i) padding = std::max(padding, buckets[i] - buckets[i - 1]);
  return params.micro_batch + (padding + params.context - 1) / params.context;
}

BatchLoader::BatchLoader(const TokenDataset& dataset, const LoaderParams& params)
    : dataset_(dataset), params_(params) {
  if (params.batch < 1 || params.micro_batch < 1 || params.context < 1 || params.offsets < 1)
    throw kernels::ConfigError(
        "train.batch, train.micro_batch, model.context and the heads' offsets must be at least 1");
  if (dataset.samples() < 1)
    throw kernels::DataError("the data holds no sample; run foretell prepare with more text");
}

std::vector<std::vector<int64_t>> BatchLoader::group(const std::vector<int64_t>& samples) const {
  const auto bucket = [&](int64_t i) {
    const int64_t rows = std::min(dataset_.length(samples[i]) - 1, params_.context);
    return (rows - 1) * kLengthBuckets / params_.context;
  };
  const auto order = counting_sort(static_cast<int64_t>(samples.size()), kLengthBuckets, bucket);
  std::vector<std::vector<int64_t>> groups;
  for (size_t i = 0; i < order.size(); ++i) {
    if (i % static_cast<size_t>(params_.micro_batch) == 0) groups.emplace_back();
    groups.back().push_back(samples[order[i]]);
  }
  return groups;
}

StepPlan BatchLoader::plan(int64_t step) const {
  const int64_t count = dataset_.samples();
  std::vector<int64_t> samples;
  for (int64_t position = step * params_.batch; position < (step + 1) * params_.batch; ++position)
    samples.push_back(
        Permutation(params_.seed, static_cast<uint64_t>(position / count), count)(position % count));
  StepPlan plan;
  auto groups = group(samples);
  for (int64_t g : spread_order(static_cast<int64_t>(groups.size())))
    plan.micro_batches.push_back(std::move(groups[g]));
  plan.weight_sums.assign(params_.offsets, 0.0);
  for (int64_t sample : samples) {
    const int64_t length = dataset_.length(sample);
    const std::vector<float> weights = dataset_.weights(sample);
    for (int64_t k = 0; k < params_.offsets && k + 1 < length; ++k)
      plan.weight_sums[k] += weights.empty() ? static_cast<double>(length - 1 - k)
                                             : std::accumulate(weights.begin() + k + 1, weights.end(), 0.0);
  }
  return plan;
}

Batch BatchLoader::load(std::span<const int64_t> samples) const {
  int64_t rows = 0;
  for (int64_t sample : samples) rows += dataset_.length(sample) - 1;
  const auto buckets = row_buckets();
  const auto bucket = std::lower_bound(buckets.begin(), buckets.end(), rows);
  if (bucket == buckets.end())
    throw kernels::ShapeError(fmt::format("batch: at most {} rows expected, given {}", buckets.back(), rows));
  Batch batch;
  batch.offsets = params_.offsets;
  batch.tokens.reserve(*bucket);
  batch.positions.reserve(*bucket);
  batch.cu_seqlens = {0};
  batch.targets.assign(params_.offsets * *bucket, -1);
  batch.weights.assign(params_.offsets * *bucket, 0.0f);
  for (int64_t sample : samples) append(batch, dataset_.sample(sample), dataset_.weights(sample), *bucket);
  pad(batch, *bucket, params_.context);
  return batch;
}

std::vector<std::vector<int64_t>> BatchLoader::all_micro_batches() const {
  std::vector<int64_t> samples(dataset_.samples());
  std::iota(samples.begin(), samples.end(), int64_t{0});
  return group(samples);
}

std::vector<std::vector<int64_t>> BatchLoader::some_micro_batches(int64_t most) const {
  auto all = all_micro_batches();
  const int64_t size = static_cast<int64_t>(all.size());
  if (most < 1 || most >= size) return all;
  std::vector<std::vector<int64_t>> chosen;
  for (int64_t i = 0; i < most; ++i) chosen.push_back(std::move(all[(2 * i + 1) * size / (2 * most)]));
  return chosen;
}

}  // namespace data

#include "data/batch_loader.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "data/permutation.h"
#include "kernels/core/error.h"
#include "prepared.h"

namespace data {
namespace {

using data_test::Scratch;

TEST(Permutation, VisitsEveryPositionOnceForAnySize) {
  for (int64_t size : {1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097}) {
    const Permutation permutation(7, 3, size);
    std::set<int64_t> seen;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t x = permutation(i);
      ASSERT_GE(x, 0);
      ASSERT_LT(x, size);
      seen.insert(x);
    }
    EXPECT_EQ(static_cast<int64_t>(seen.size()), size);
  }
}

TEST(Permutation, DependsOnSeedAndEpochAndShuffles) {
  const int64_t size = 1000;
  const Permutation a(1, 0, size), b(2, 0, size), c(1, 1, size);
  int same_seed = 0, same_epoch = 0, fixed = 0, ascending = 0;
  for (int64_t i = 0; i < size; ++i) {
    same_seed += a(i) == b(i);
    same_epoch += a(i) == c(i);
    fixed += a(i) == i;
    ascending += i > 0 && a(i) > a(i - 1);
  }
  // About one coincidence is expected in each count; half of the neighbours ascend (deviation about 9).
  EXPECT_LT(same_seed, 10);
  EXPECT_LT(same_epoch, 10);
  EXPECT_LT(fixed, 10);
  EXPECT_NEAR(ascending, 500, 60);
}

class Loader : public ::testing::Test {
 protected:
  Loader() { data_test::prepare_bytes(scratch_, 40); }
  Scratch scratch_;
  LoaderParams params_ = {.seed = 5, .batch = 10, .micro_batch = 4, .context = 48, .offsets = 3};
};

TEST_F(Loader, EpochsDrawEverySampleOnce) {
  const TokenDataset dataset(scratch_ / "out", "train", 48);
  const BatchLoader loader(dataset, params_);
  const int64_t count = dataset.samples();
  ASSERT_GT(count, 30);
  std::map<int64_t, int> drawn;
  const int64_t steps = count;  // batch epochs in all
  for (int64_t step = 0; step < steps; ++step)
    for (const auto& micro : loader.plan(step).micro_batches)
      for (int64_t sample : micro) ++drawn[sample];
  EXPECT_EQ(static_cast<int64_t>(drawn.size()), count);
  for (const auto& [sample, times] : drawn) EXPECT_EQ(times, params_.batch) << sample;
}

TEST_F(Loader, PlanIsAFunctionOfSeedAndStep) {
  const TokenDataset dataset(scratch_ / "out", "train", 48);
  const BatchLoader a(dataset, params_), b(dataset, params_);
  const auto late = a.plan(17);
  for (int64_t step = 0; step < 17; ++step) b.plan(step);
  EXPECT_EQ(b.plan(17).micro_batches, late.micro_batches);
  EXPECT_NE(a.plan(18).micro_batches, late.micro_batches);
  params_.seed = 6;
  EXPECT_NE(BatchLoader(dataset, params_).plan(17).micro_batches, late.micro_batches);
}

TEST_F(Loader, MicroBatchesHoldSimilarLengths) {
  const TokenDataset dataset(scratch_ / "out", "train", 48);
  const BatchLoader loader(dataset, params_);
  const auto groups = loader.all_micro_batches();
  std::set<int64_t> seen;
  int64_t last = 0;
  for (const auto& group : groups) {
    EXPECT_LE(group.size(), 4u);
    for (int64_t sample : group) {
      EXPECT_TRUE(seen.insert(sample).second);
      EXPECT_GE(dataset.length(sample), last);  // 48 rows in 64 buckets: the sort is exact
      last = dataset.length(sample);
    }
  }
  EXPECT_EQ(static_cast<int64_t>(seen.size()), dataset.samples());
}

TEST_F(Loader, SomeMicroBatchesHoldShortAndLongSamples) {
  const TokenDataset dataset(scratch_ / "out", "train", 48);
  const BatchLoader loader(dataset, params_);
  const auto all = loader.all_micro_batches();
  const int64_t size = static_cast<int64_t>(all.size());
  ASSERT_GT(size, 8);
  EXPECT_EQ(loader.some_micro_batches(0), all);
  EXPECT_EQ(loader.some_micro_batches(size), all);
  EXPECT_EQ(loader.some_micro_batches(size + 1), all);
  for (int64_t most = 1; most < size; ++most) {
    const auto some = loader.some_micro_batches(most);
    EXPECT_EQ(static_cast<int64_t>(some.size()), most);
    EXPECT_EQ(loader.some_micro_batches(most), some);
    double places = 0;
    for (size_t i = 0; i < some.size(); ++i) {
      const auto found = std::find(all.begin(), all.end(), some[i]);
      ASSERT_NE(found, all.end());
      places += static_cast<double>(found - all.begin()) / static_cast<double>(most);
      if (i > 0) {
        EXPECT_LT(std::find(all.begin(), all.end(), some[i - 1]), found) << "ascending, no two the same";
      }
    }
    EXPECT_NEAR(places, static_cast<double>(size - 1) / 2, 0.501) << "on average the middle, for " << most;
  }
}

TEST_F(Loader, MicroBatchesNeedNotDivideTheBatch) {
  const TokenDataset dataset(scratch_ / "out", "train", 48);
  const auto plan = BatchLoader(dataset, params_).plan(0);
  std::multiset<size_t> sizes;
  for (const auto& micro : plan.micro_batches) sizes.insert(micro.size());
  EXPECT_EQ(sizes, (std::multiset<size_t>{2, 4, 4}));
}

TEST_F(Loader, BatchesAreTheSamplesWithTheirTargets) {
  const TokenDataset dataset(scratch_ / "out", "train", 48);
  const BatchLoader loader(dataset, params_);
  const auto buckets = loader.row_buckets();
  std::vector<double> sums(3, 0.0);
  const auto plan = loader.plan(2);
  for (const auto& micro : plan.micro_batches) {
    const Batch batch = loader.load(micro);
    ASSERT_TRUE(std::count(buckets.begin(), buckets.end(), batch.rows()));
    ASSERT_EQ(batch.targets.size(), static_cast<size_t>(3 * batch.rows()));
    ASSERT_EQ(batch.weights.size(), batch.targets.size());
    EXPECT_EQ(batch.cu_seqlens.front(), 0);
    EXPECT_EQ(batch.cu_seqlens.back(), batch.rows());
    int64_t longest = 0;
    for (size_t s = 0; s + 1 < batch.cu_seqlens.size(); ++s) {
      const int64_t begin = batch.cu_seqlens[s], length = batch.cu_seqlens[s + 1] - begin;
      longest = std::max(longest, length);
      ASSERT_GT(length, 0);
      ASSERT_LE(length, 48);
      const std::vector<int32_t> tokens =
          s < micro.size() ? dataset.sample(micro[s]) : std::vector<int32_t>(static_cast<size_t>(length), 0);
      for (int64_t i = 0; i < length; ++i) {
        EXPECT_EQ(batch.tokens[begin + i], tokens[i]);
        EXPECT_EQ(batch.positions[begin + i], i);
        for (int64_t k = 0; k < 3; ++k) {
          const bool inside = i + k + 1 < static_cast<int64_t>(tokens.size()) && s < micro.size();
          EXPECT_EQ(batch.targets[k * batch.rows() + begin + i], inside ? tokens[i + k + 1] : -1);
          EXPECT_EQ(batch.weights[k * batch.rows() + begin + i], inside ? 1.0f : 0.0f);
        }
      }
    }
    EXPECT_EQ(batch.max_length, longest);
    for (int64_t k = 0; k < 3; ++k)
      for (int64_t i = 0; i < batch.rows(); ++i) sums[k] += batch.weights[k * batch.rows() + i];
  }
  EXPECT_EQ(plan.weight_sums, sums);
}

TEST_F(Loader, RowBucketsAreFewAndAscend) {
  const TokenDataset dataset(scratch_ / "out", "train", 48);
  for (int64_t micro : {1, 3, 4, 8, 64}) {
    params_.micro_batch = micro;
    const auto buckets = BatchLoader(dataset, params_).row_buckets();
    EXPECT_LE(buckets.size(), 8u);
    EXPECT_GE(buckets.back(), micro * 48);
    for (size_t i = 0; i < buckets.size(); ++i) {
      EXPECT_EQ(buckets[i] % 64, 0);
      if (i > 0) {
        EXPECT_GT(buckets[i], buckets[i - 1]);
      }
    }
  }
}

TEST_F(Loader, PromptsWeighNothing) {
  const std::string file = scratch_.write(
      "qa.jsonl",
      "{\"prompt\":\"abc\",\"completion\":\"defg\"}\n{\"prompt\":\"hello \",\"completion\":\"you\"}\n");
  PrepareParams params;
  params.inputs = {file};
  params.output = scratch_ / "qa";
  params.tokenizer = "bytes";
  params.text_key = "prompt+completion";
  params.validation_fraction = 0;
  prepare(params, {});
  const TokenDataset dataset(scratch_ / "qa", "train", 48);
  ASSERT_EQ(dataset.samples(), 2);
  EXPECT_EQ(dataset.weights(0), (std::vector<float>{0, 0, 0, 1, 1, 1, 1, 1}));
  const BatchLoader loader(dataset, {.batch = 2, .micro_batch = 2, .context = 48, .offsets = 2});
  const auto plan = loader.plan(0);
  // Completions and the end of text: 4 + 1 and 3 + 1. With one offset more nothing is lost: prompts are
  // longer than 1.
  EXPECT_EQ(plan.weight_sums, (std::vector<double>{9, 9}));
  const Batch batch = loader.load(std::vector<int64_t>{0});
  EXPECT_EQ(std::vector<float>(batch.weights.begin(), batch.weights.begin() + 8),
            (std::vector<float>{0, 0, 1, 1, 1, 1, 1, 0}));
}

TEST_F(Loader, RefusesBadParameters) {
  const TokenDataset dataset(scratch_ / "out", "train", 48);
  params_.micro_batch = 0;
  EXPECT_THROW(BatchLoader(dataset, params_), kernels::ConfigError);
  params_.micro_batch = 1;
  const BatchLoader loader(dataset, params_);
  EXPECT_THROW(loader.load(std::vector<int64_t>{0, 1, 2, 3, 4, 5}), kernels::ShapeError);
  EXPECT_THROW(loader.load(std::vector<int64_t>{dataset.samples()}), kernels::DataError);
  EXPECT_THROW(TokenDataset(scratch_ / "out", "train", 0), kernels::ConfigError);
}

}  // namespace
}  // namespace data

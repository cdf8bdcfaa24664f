#include "data/sorting.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "kernels/core/philox.h"

namespace data {
namespace {

uint64_t random_key(uint64_t seed, int64_t i) {
  const auto r = kernels::philox(seed, kernels::Purpose::test, static_cast<uint64_t>(i));
  return uint64_t{r[0]} << 32 | r[1];
}

// What a stable comparison sort gives.
template <typename Key>
std::vector<int64_t> expected_order(int64_t count, Key&& key) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key(a) < key(b); });
  return order;
}

TEST(Sorting, CountingSortIsStableAndAPermutation) {
  for (int64_t count : {0, 1, 2, 17, 1000})
    for (int64_t keys : {1, 2, 5, 300}) {
      const auto key = [&](int64_t i) {
        return static_cast<int64_t>(random_key(3, i) % static_cast<uint64_t>(keys));
      };
      EXPECT_EQ(counting_sort(count, keys, key), expected_order(count, key))
          << count << " items, " << keys << " keys";
    }
}

TEST(Sorting, BucketSortIsStableAndAPermutation) {
  for (int64_t count : {0, 1, 2, 17, 1000, 5000})
    for (uint64_t distinct : {uint64_t{1}, uint64_t{7}, ~uint64_t{0}}) {
      const auto key = [&](int64_t i) {
        return distinct == ~uint64_t{0} ? random_key(4, i)
                                        : random_key(5, static_cast<int64_t>(random_key(4, i) % distinct));
      };
      EXPECT_EQ(bucket_sort(count, key), expected_order(count, key))
          << count << " items, " << distinct << " keys";
    }
}

TEST(Sorting, BucketSortTakesTheExtremeKeys) {
  const std::vector<uint64_t> keys = {~uint64_t{0}, 0, 1, ~uint64_t{0} - 1, uint64_t{1} << 63, 0};
  EXPECT_EQ(bucket_sort(6, [&](int64_t i) { return keys[static_cast<size_t>(i)]; }),
            (std::vector<int64_t>{1, 5, 2, 4, 3, 0}));
}

}  // namespace
}  // namespace data

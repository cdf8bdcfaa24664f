#pragma once
// Stable orders by key in linear time. Both return a permutation: order[i] is the index of the item that
// comes i-th; equal keys keep their order.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace data {

// Counting sort of `count` items; key(i) is an integer in [0, keys).
template <typename Key>
std::vector<int64_t> counting_sort(int64_t count, int64_t keys, Key&& key) {
  std::vector<int64_t> first(keys + 1, 0), order(count);
  for (int64_t i = 0; i < count; ++i) ++first[key(i) + 1];
  for (int64_t k = 0; k < keys; ++k) first[k + 1] += first[k];
  for (int64_t i = 0; i < count; ++i) order[first[key(i)]++] = i;
  return order;
}

// Bucket sort of `count` items by unsigned 64-bit keys spread evenly over their range, as hashes are: one
// bucket per item on average by the leading bits, then a short stable sort in each.
template <typename Key>
std::vector<int64_t> bucket_sort(int64_t count, Key&& key) {
  int bits = 1;
  while (bits < 24 && (int64_t{1} << bits) < count) ++bits;
  const auto bucket = [&](int64_t i) { return static_cast<int64_t>(uint64_t{key(i)} >> (64 - bits)); };
  std::vector<int64_t> order = counting_sort(count, int64_t{1} << bits, bucket);
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    while (end < count && bucket(order[end]) == bucket(order[begin])) ++end;
    std::stable_sort(order.begin() + begin, order.begin() + end,
                     [&](int64_t a, int64_t b) { return key(a) < key(b); });
  }
  return order;
}

}  // namespace data

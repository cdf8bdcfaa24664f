#pragma once
// A keyed permutation of [0, size) that can be evaluated at any position, without a table: a balanced Feistel
// network over the next power of four, whose round function is Philox, walked along its cycle until it falls
// inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). The domain is at most four times
// the size, so a walk takes fewer than four steps on average.
#include <cstdint>

#include "kernels/core/philox.h"

namespace data {

class Permutation {
 public:
  // size >= 1 and below 2^62; `epoch` below 2^32 picks one permutation of the seed's family.
  Permutation(uint64_t seed, uint64_t epoch, int64_t size) : seed_(seed), epoch_(epoch), size_(size) {
    while ((uint64_t{1} << (2 * half_bits_)) < static_cast<uint64_t>(size)) ++half_bits_;
  }
  int64_t operator()(int64_t position) const {
    uint64_t x = static_cast<uint64_t>(position);
    do x = encrypt(x);
    while (x >= static_cast<uint64_t>(size_));
    return static_cast<int64_t>(x);
  }

 private:
  static constexpr uint32_t kRounds = 6;
  uint64_t encrypt(uint64_t x) const {
    const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
    uint64_t left = x >> half_bits_, right = x & mask;
    for (uint32_t round = 0; round < kRounds; ++round) {
      const auto r = kernels::philox(seed_, kernels::Purpose::shuffle, epoch_ << 32 | right, round);
      const uint64_t next = left ^ (r[0] & mask);
      left = right;
      right = next;
    }
    return left << half_bits_ | right;
  }
  uint64_t seed_, epoch_;
  int64_t size_;
  int half_bits_ = 1;
};

}  // namespace data

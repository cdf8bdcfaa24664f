#pragma once
// Sums over rows that many blocks take together: each block writes the sum of its rows, its share, and the
// shares are added in order.
#include "kernels/core/context.h"

namespace kernels::cuda {

// Up to two sums over the same rows.
struct Shares {
  const float* shares[2];  // (count, columns)
  float* sums[2];          // (columns)
};

// sums[i] += the sum of shares[i] over its rows, in a fixed order, for i < number.
void add_shares(const Context& ctx, const char* operation, const Shares& all, int number, int64_t count,
                int columns);

}  // namespace kernels::cuda

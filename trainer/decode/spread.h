#pragma once
#include <vector>

namespace trainer {

// Repeated measurements of one thing. The median: of an even number, the mean of the two in the middle.
struct Spread {
  double median = 0, low = 0, high = 0;
};
// All 0 of none.
Spread spread_of(std::vector<double> values);

}  // namespace trainer

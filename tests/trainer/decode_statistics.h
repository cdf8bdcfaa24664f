#pragma once
#include <cmath>

namespace trainer::decode_test {

// The upper tail of chi-square with n degrees of freedom at x, by Wilson and Hilferty's cube-root
// approximation; its error is far below the thresholds used.
inline double chi_square_tail(double x, double n) {
  const double z = (std::cbrt(x / n) - (1 - 2 / (9 * n))) / std::sqrt(2 / (9 * n));
  return 0.5 * std::erfc(z / std::sqrt(2.0));
}

}  // namespace trainer::decode_test

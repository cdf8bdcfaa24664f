#pragma once
// What programs of several ranks share: values that every rank can compute of every other one, the serial
// reduction of them, and the list of what went wrong.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "comm/gradient_reducer.h"

namespace ranks {

inline int failures = 0;

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  fmt::print(stderr, "FAILED: {}\n", what);
}

// What rank r contributes: values of mixed size and sign, so that the order of a sum shows in its bits.
template <typename T>
std::vector<T> values_of(int r, int64_t n, uint32_t seed) {
  std::mt19937 random(seed * 131u + static_cast<uint32_t>(r));
  std::vector<T> v(static_cast<size_t>(n));
  for (T& x : v) {
    const double u = static_cast<double>(random()) / 4294967296.0 - 0.5;
    x = static_cast<T>(std::is_integral_v<T> ? u * 2e6 : std::ldexp(u, static_cast<int>(random() % 30)));
  }
  return v;
}

// The values of all ranks reduced, in the order of the ranks.
template <typename T>
std::vector<T> reduced(int ranks, int64_t n, uint32_t seed, comm::Reduce op) {
  std::vector<T> result = values_of<T>(0, n, seed);
  for (int r = 1; r < ranks; ++r) {
    const std::vector<T> v = values_of<T>(r, n, seed);
    for (size_t i = 0; i < v.size(); ++i)
      result[i] = op == comm::Reduce::sum ? static_cast<T>(result[i] + v[i]) : std::max(result[i], v[i]);
  }
  return result;
}

// [0, elements) from its end in layers of `size`.
inline std::vector<comm::GradientRange> layers(int64_t elements, int64_t size) {
  std::vector<comm::GradientRange> parts;
  for (int64_t end = elements; end > 0; end -= size)
    parts.emplace_back(std::max<int64_t>(0, end - size), end);
  return parts;
}

// (stripes, ranks, n) over a dense tensor.
inline kernels::Tensor striped(const kernels::Tensor& t, int ranks, int64_t n) {
  return t.view({n > 0 ? t.numel() / ranks / n : 1, ranks, n});
}

// What rank r owns of values cut into such stripes.
template <typename T>
std::vector<T> owned(const std::vector<T>& v, int r, int ranks, int64_t n) {
  std::vector<T> own;
  for (size_t i = 0; i < v.size(); ++i)
    if (static_cast<int64_t>(i) / n % ranks == r) own.push_back(v[i]);
  return own;
}

}  // namespace ranks

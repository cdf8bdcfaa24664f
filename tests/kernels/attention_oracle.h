#pragma once
// Attention as the definition reads, in fp64, row against row: independent of the kernels under test.
#include <algorithm>
#include <cmath>
#include <vector>

namespace oracle {

struct Sizes {
  int64_t heads, key_heads, width;
};

inline double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}
inline double phi(double x) { return x > 0 ? x + 1 : std::exp(x); }

enum class Kind { softmax, linear, linear_plain };

// weight[j] of the rows before and at i, up to a factor common to all; returns that factor. q and keys are
// features already where the kind has them.
inline double weights(Kind kind, const double* q, const std::vector<const double*>& keys, int64_t width,
                      std::vector<double>& weight) {
  weight.assign(keys.size(), 0);
  double largest = -1e300, sum = 0;
  for (size_t j = 0; j < keys.size(); ++j) {
    weight[j] = dot(q, keys[j], width);
    if (kind == Kind::softmax) weight[j] /= std::sqrt(static_cast<double>(width));
    largest = std::max(largest, weight[j]);
  }
  for (double& w : weight) {
    if (kind == Kind::softmax) w = std::exp(w - largest);
    sum += w;
  }
  // eps as the operation has it: the float nearest to 1e-6.
  if (kind == Kind::linear) sum += static_cast<double>(1e-6f);
  return kind == Kind::linear_plain ? 1 : 1 / sum;
}

// o (N, H, D) from q (N, H, D), k, v (N, Hk, D).
inline std::vector<double> attention(Kind kind, const Sizes& s, std::vector<double> q, std::vector<double> k,
                                     const std::vector<double>& v, const std::vector<int>& cu) {
  std::vector<double> o(q.size(), 0), weight;
  if (kind != Kind::softmax) {
    for (double& x : q) x = phi(x);
    for (double& x : k) x = phi(x);
  }
  for (size_t sequence = 0; sequence + 1 < cu.size(); ++sequence)
    for (int64_t head = 0; head < s.heads; ++head) {
      const int64_t key_head = head / (s.heads / s.key_heads);
      std::vector<const double*> keys;
      for (int64_t i = cu[sequence]; i < cu[sequence + 1]; ++i) {
        keys.push_back(&k[static_cast<size_t>((i * s.key_heads + key_head) * s.width)]);
        const size_t at = static_cast<size_t>((i * s.heads + head) * s.width);
        const double factor = weights(kind, &q[at], keys, s.width, weight);
        for (size_t j = 0; j < keys.size(); ++j)
          for (int64_t d = 0; d < s.width; ++d)
            o[at + static_cast<size_t>(d)] +=
                factor * weight[j] * v[static_cast<size_t>(keys[j] - k.data() + d)];
      }
    }
  return o;
}

}  // namespace oracle

#include "kernels/core/row_math.h"

#include <hwy/highway.h>

#include <algorithm>

namespace kernels {

namespace {

namespace hn = hwy::HWY_NAMESPACE;

// The baseline's vectors, on newer machines, too: so that sums have one order.
constexpr hn::FixedTag<float, 8> kFloats;
constexpr hn::FixedTag<float, 4> kHalf;
constexpr hn::FixedTag<double, 4> kDoubles;
constexpr int64_t kLanes = 16, kBlock = 1024;

// The sum of term(i), i < n; terms(i) are four from i on. Number i goes to lane i % kLanes, and lanes are
// added in order.
template <typename Terms, typename Term>
double sum_of(int64_t n, const Terms& terms, const Term& term) {
  auto sum0 = hn::Zero(kDoubles), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    sum0 = hn::Add(sum0, terms(i));
    sum1 = hn::Add(sum1, terms(i + 4));
    sum2 = hn::Add(sum2, terms(i + 8));
    sum3 = hn::Add(sum3, terms(i + 12));
  }
  alignas(32) double lanes[kLanes];
  hn::Store(sum0, kDoubles, lanes);
  hn::Store(sum1, kDoubles, lanes + 4);
  hn::Store(sum2, kDoubles, lanes + 8);
  hn::Store(sum3, kDoubles, lanes + 12);
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += term(i + j);
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

auto four(const float* x) { return hn::PromoteTo(kDoubles, hn::LoadU(kHalf, x)); }

float largest_of(const float* x, int64_t n) {
  auto largest = hn::Set(kFloats, x[0]);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) largest = hn::Max(largest, hn::LoadU(kFloats, x + i));
  float found = hn::GetLane(hn::MaxOfLanes(kFloats, largest));
  for (; i < n; ++i) found = std::max(found, x[i]);
  return found;
}

// Of what is positive in a row.
double positive_sum(const float* x, int64_t n) {
  const auto zero = hn::Zero(kHalf);
  return sum_of(
      n, [&](int64_t i) { return hn::PromoteTo(kDoubles, hn::Max(hn::LoadU(kHalf, x + i), zero)); },
      [&](int64_t i) { return static_cast<double>(std::max(x[i], 0.0f)); });
}

}  // namespace

double row_dot(const float* x, const float* y, int64_t n) {
  return sum_of(
      n, [&](int64_t i) { return hn::Mul(four(x + i), four(y + i)); },
      [&](int64_t i) { return static_cast<double>(x[i]) * static_cast<double>(y[i]); });
}

int64_t row_argmax(const float* x, int64_t n) {
  int64_t first = 0;
  float largest = x[0];
  for (int64_t i = 0; i < n; i += kBlock) {
    const float of_block = largest_of(x + i, std::min(kBlock, n - i));
    if (of_block <= largest) continue;
    largest = of_block;
    first = i;
  }
  const float* found = std::find(x + first, x + n, largest);
  return found == x + n ? first : found - x;  // NaN equals nothing
}

int64_t row_draw(const float* x, int64_t n, float u) {
  double total = 0;
  for (int64_t i = 0; i < n; i += kBlock) total += positive_sum(x + i, std::min(kBlock, n - i));
  const double target = u * total;
  double before = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t end = std::min(i + kBlock, n);
    const double here = positive_sum(x + i, end - i);
    if (target >= before + here && before + here < total) {
      before += here;
      continue;
    }
    double sum = before;
    for (int64_t j = i; j < end; ++j) {
      if (x[j] <= 0) continue;
      sum += x[j];
      last = j;
      if (target < sum) return last;
    }
    before += here;
  }
  return last;
}

void row_subtract(const float* x, const float* y, float* to, int64_t n) {
  const auto zero = hn::Zero(kFloats);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    hn::StoreU(hn::Max(hn::Sub(hn::LoadU(kFloats, x + i), hn::LoadU(kFloats, y + i)), zero), kFloats, to + i);
  for (; i < n; ++i) to[i] = std::max(x[i] - y[i], 0.0f);
}

bool row_normalise(float* x, int64_t n) {
  const double total = sum_of(
      n, [&](int64_t i) { return four(x + i); }, [&](int64_t i) { return static_cast<double>(x[i]); });
  if (!(total > 0)) return false;
  const float scale = static_cast<float>(1 / total);
  const auto scales = hn::Set(kFloats, scale);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) hn::StoreU(hn::Mul(hn::LoadU(kFloats, x + i), scales), kFloats, x + i);
  for (; i < n; ++i) x[i] *= scale;
  return true;
}

}  // namespace kernels

#include "kernels/ops/sampling.h"

#include <cmath>

#include "kernels/cpu/rows.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sampling.cpp"
#include <hwy/foreach_target.h>
#include "kernels/cpu/lanes-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kernels::cpu::HWY_NAMESPACE {

// The first index of the largest value; 0 where every value is NaN.
template <typename T>
int32_t argmax_row(const T* x, int64_t n) {
  const Lanes<T> d;
  const auto best = hn::Set(d, row_max(x, n));
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const intptr_t lane = hn::FindFirstTrue(d, hn::Eq(load(d, x + i, Whole{}), best));
    if (lane >= 0) return static_cast<int32_t>(i + lane);
  }
  for (; i < n; ++i)
    if (acc_t<T>(x[i]) == hn::GetLane(best)) return static_cast<int32_t>(i);
  return 0;
}

template <typename T>
void softmax_row(const T* x, int64_t n, acc_t<T> scale, acc_t<T>* p) {
  const Lanes<T> d;
  const acc_t<T> max = row_max(x, n);
  const auto m = hn::Set(d, max), s = hn::Set(d, scale);
  const auto inverse = hn::Set(d, acc_t<T>(1) / row_exp_sum(x, n, max, scale));
  for_columns(d, n, [&](size_t i, auto extent) HWY_ATTR {
    const auto e = exponential(d, hn::Mul(hn::Sub(load(d, x + i, extent), m), s));
    store(d, hn::Mul(e, inverse), p + i, extent);
  });
}

// Puts index i into the list of `count` indices in descending order of x, behind its equals; NaN counts as
// -infinity. The list holds at most k.
template <typename T>
void insert(const T* x, int32_t i, int32_t* list, int64_t count, int64_t k) {
  const auto rank = [&](int32_t j) {
    const auto v = acc_t<T>(x[j]);
    return std::isnan(v) ? -std::numeric_limits<acc_t<T>>::infinity() : v;
  };
  const auto value = rank(i);
  int64_t place = std::min(count, k - 1);
  for (; place > 0 && value > rank(list[place - 1]); --place) list[place] = list[place - 1];
  list[place] = i;
}

template <typename T>
void top_k_row(const T* x, int64_t n, int32_t* list, int64_t k) {
  for (int64_t i = 0; i < k; ++i) insert(x, static_cast<int32_t>(i), list, i, k);
  const Lanes<T> d;
  constexpr auto kLowest = -std::numeric_limits<acc_t<T>>::infinity();
  const auto worst = [&] {
    const auto v = acc_t<T>(x[list[k - 1]]);
    return std::isnan(v) ? kLowest : v;
  };
  for_columns(d, n - k, [&](size_t offset, auto extent) HWY_ATTR {
    const int64_t first = k + static_cast<int64_t>(offset);
    if (hn::AllFalse(d, hn::Gt(load(d, x + first, extent, kLowest), hn::Set(d, worst())))) return;
    const int64_t last = std::min(n, first + static_cast<int64_t>(hn::Lanes(d)));
    for (int64_t i = first; i < last; ++i)
      if (acc_t<T>(x[i]) > worst()) insert(x, static_cast<int32_t>(i), list, k, k);
  });
}

void argmax_range(const Tensor& logits, int32_t* tokens, int64_t begin, int64_t end) {
  visit_dtype(logits.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t i = begin; i < end; ++i) tokens[i] = argmax_row(row<T>(logits, i), logits.cols());
  });
}

void softmax_range(const Tensor& logits, float temperature, const Tensor& p, int64_t begin, int64_t end) {
  visit_dtype(logits.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    for (int64_t i = begin; i < end; ++i)
      softmax_row(row<T>(logits, i), logits.cols(), A(1) / A(temperature), row<A>(p, i));
  });
}

void top_k_range(const Tensor& logits, const Tensor& indices, int64_t begin, int64_t end) {
  visit_dtype(logits.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t i = begin; i < end; ++i)
      top_k_row(row<T>(logits, i), logits.cols(), row<int32_t>(indices, i), indices.cols());
  });
}

}  // namespace kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kernels::cpu {
HWY_EXPORT(argmax_range);
HWY_EXPORT(softmax_range);
HWY_EXPORT(top_k_range);

void argmax(const Context&, const Tensor& logits, Tensor tokens) {
  const auto fn = HWY_DYNAMIC_DISPATCH(argmax_range);
  auto* out = tokens.as<int32_t>();
  parallel_rows(logits.rows(), logits.cols(),
                [&](int64_t begin, int64_t end) { fn(logits, out, begin, end); });
}

void probabilities(const Context&, const Tensor& logits, float temperature, Tensor p) {
  const auto fn = HWY_DYNAMIC_DISPATCH(softmax_range);
  parallel_rows(logits.rows(), logits.cols(),
                [&](int64_t begin, int64_t end) { fn(logits, temperature, p, begin, end); });
}

void top_k(const Context&, const Tensor& logits, Tensor indices) {
  if (indices.cols() == 0) return;
  const auto fn = HWY_DYNAMIC_DISPATCH(top_k_range);
  parallel_rows(logits.rows(), logits.cols(),
                [&](int64_t begin, int64_t end) { fn(logits, indices, begin, end); });
}

}  // namespace kernels::cpu
#endif

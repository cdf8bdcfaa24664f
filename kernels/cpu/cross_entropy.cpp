#include "kernels/ops/cross_entropy.h"

#include <fmt/format.h>

#include <array>
#include <cmath>

#include "kernels/cpu/rows.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/cross_entropy.cpp"
#include <hwy/foreach_target.h>
#include "kernels/cpu/lanes-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kernels::cpu::HWY_NAMESPACE {

template <typename T>
void clear_row(T* logits, int64_t n) {
  for (int64_t c = 0; c < n; ++c) logits[c] = T(0.0f);
}

// Loss of one row; its gradient, multiplied by `scale`, replaces the logits where write is set.
template <typename T>
double entropy_row(T* logits, int64_t n, int32_t target, acc_t<T> scale, bool write) {
  using A = acc_t<T>;
  const A max = row_max(logits, n), at_target = A(logits[target]);
  const A sum = row_exp_sum(logits, n, max, A(1));
  if (write) {
    const Lanes<T> d;
    const auto m = hn::Set(d, max), factor = hn::Set(d, scale / sum);
    for_columns(d, n, [&](size_t i, auto extent) HWY_ATTR {
      store(d, hn::Mul(exponential(d, hn::Sub(load(d, logits + i, extent), m)), factor), logits + i, extent);
    });
    logits[target] = T(scale * (std::exp(at_target - max) / sum - A(1)));
  }
  return double(std::log(sum)) - (double(at_target) - double(max));
}

// Weighted losses of rows [begin, end) to losses[row - first].
void entropy_range(const Tensor& logits, const int32_t* targets, const float* weights, const float* seed,
                   int64_t first, double* losses, int64_t begin, int64_t end) {
  visit_dtype(logits.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t n = logits.cols();
    for (int64_t i = begin; i < end; ++i) {
      losses[i - first] = 0;
      if (weights[i] != 0 && targets[i] >= 0) {
        const acc_t<T> scale = acc_t<T>(seed ? *seed : 0.0f) * acc_t<T>(weights[i]);
        losses[i - first] =
            double(weights[i]) * entropy_row(row<T>(logits, i), n, targets[i], scale, seed != nullptr);
      } else if (seed) {
        clear_row(row<T>(logits, i), n);
      }
    }
  });
}

}  // namespace kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kernels::cpu {
HWY_EXPORT(entropy_range);

void cross_entropy(const Context&, Tensor logits, const Tensor& targets, const Tensor& weights,
                   const Tensor& seed, Tensor loss_sum) {
  const auto* target = targets.as<int32_t>();
  const float* seed_value = seed ? seed.as<float>() : nullptr;
  const int64_t rows = logits.rows(), vocabulary = logits.cols();
  for (int64_t i = 0; i < rows; ++i)
    if (target[i] >= vocabulary)
      throw ShapeError(fmt::format("cross_entropy: target {} of row {} is beyond the vocabulary of {}",
                                   target[i], i, vocabulary));
  // The losses of a block of rows wait here to be summed in order, whichever thread computed them.
  static thread_local std::array<double, 4096> losses;
  double* block = losses.data();
  const auto fn = HWY_DYNAMIC_DISPATCH(entropy_range);
  for (int64_t first = 0; first < rows; first += std::ssize(losses)) {
    const int64_t count = std::min<int64_t>(std::ssize(losses), rows - first);
    parallel_rows(count, vocabulary, [&](int64_t begin, int64_t end) {
      fn(logits, target, weights.as<float>(), seed_value, first, block, first + begin, first + end);
    });
    for (int64_t i = 0; i < count; ++i) *loss_sum.as<double>() += block[i];
  }
}

}  // namespace kernels::cpu
#endif

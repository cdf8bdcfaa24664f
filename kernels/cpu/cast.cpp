#include "kernels/ops/cast.h"

#include <algorithm>

#include "kernels/core/parallel.h"
#include "kernels/cpu/convert.h"

namespace kernels::cpu {

namespace {

constexpr int64_t kGrain = int64_t{1} << 15;

// Calls fn(first element of a run in dimension 0's layout, length) so that a dense tensor is cut into long
// runs and a strided one into its rows.
template <typename Fn>
void for_runs(const Tensor& t, bool dense, Fn&& fn) {
  if (dense)
    return parallel_for(t.numel(), kGrain, [&](int64_t begin, int64_t end) { fn(0, begin, end - begin); });
  const int64_t cols = t.cols();
  parallel_for(t.rows(), std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cols)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) fn(row, 0, cols);
               });
}

template <typename X, typename Y>
void cast_run(const X* x, Y* y, int64_t n) {
  if constexpr (std::is_same_v<X, Y>) {
    std::copy_n(x, n, y);
  } else if constexpr (std::is_same_v<X, float> && !std::is_same_v<Y, double>) {
    store_row(x, y, n);
  } else if constexpr (std::is_same_v<Y, float> && !std::is_same_v<X, double>) {
    load_row(x, y, n);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (std::is_same_v<X, double>)
        y[i] = static_cast<Y>(x[i]);
      else if constexpr (std::is_same_v<Y, double>)
        y[i] = static_cast<double>(static_cast<float>(x[i]));
      else
        y[i] = Y(static_cast<float>(x[i]));
    }
  }
}

}  // namespace

void cast(const Context&, const Tensor& x, Tensor y) {
  visit_dtype(x.dtype, [&](auto from) {
    using X = decltype(from);
    visit_dtype(y.dtype, [&](auto to) {
      using Y = decltype(to);
      for_runs(x, x.dense() && y.dense(), [&](int64_t row, int64_t begin, int64_t count) {
        cast_run(x.as<X>() + row * x.row_stride + begin, y.as<Y>() + row * y.row_stride + begin, count);
      });
    });
  });
}

void fill(const Context&, Tensor y, float value) {
  visit_dtype(y.dtype, [&](auto tag) {
    using Y = decltype(tag);
    for_runs(y, y.dense(), [&](int64_t row, int64_t begin, int64_t count) {
      std::fill_n(y.as<Y>() + row * y.row_stride + begin, count, static_cast<Y>(value));
    });
  });
}

}  // namespace kernels::cpu

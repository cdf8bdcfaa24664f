#include <algorithm>

#include "kernels/core/parallel.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/staging.h"
#include "kernels/ops/linear.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/linear_rows.cpp"
#include <hwy/foreach_target.h>
#include "kernels/cpu/lanes-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kernels::cpu::HWY_NAMESPACE {

// The panels of one thread and the rows of x, which are already of the accumulation type.
template <typename T>
struct Work {
  const LinearWeight* w;
  const acc_t<T>* x;
  int64_t stride, rows;
  const Tensor* y;
};

// A strip is two vectors of output columns: a panel with AVX-512, half of one with AVX2. One strip and a
// handful of rows keep their sums in registers.
template <typename T>
inline constexpr int64_t kStrip = 2 * HWY_MAX_BYTES / sizeof(acc_t<T>);

// Adds the bias to one row's sums of one strip, rounds them and writes those that exist.
template <typename T>
HWY_INLINE void finish(const Work<T>& work, int64_t row, int64_t column, acc_t<T>* sums) {
  const Tensor &y = *work.y, &bias = work.w->bias;
  const int64_t count = std::clamp<int64_t>(y.cols() - column, 0, kStrip<T>);
  if (bias)
    for (int64_t j = 0; j < count; ++j) sums[j] += static_cast<acc_t<T>>(bias.as<T>()[column + j]);
  if (y.dtype == dtype_of<T>())
    store_row(sums, y.as<T>() + row * y.row_stride + column, count);
  else
    store_row(sums, y.as<acc_t<T>>() + row * y.row_stride + column, count);
}

// Strips [strip, strip + kStrips) for rows [row, row + kRows). Every output is one chain of fused
// multiply-adds over i in ascending order, whatever kRows and kStrips are: that is what makes a row's result
// independent of its neighbours.
template <typename T, int kRows, int kStrips>
HWY_NOINLINE void multiply(const Work<T>& work, int64_t strip, int64_t row) {
  const hn::CappedTag<acc_t<T>, HWY_MAX_BYTES / sizeof(acc_t<T>)> d;
  constexpr int64_t kLanes = kStrip<T> / 2, kPerPanel = kPanelRows / kStrip<T>;
  using V = hn::Vec<decltype(d)>;
  const Tensor& panels = work.w->panels;
  const int64_t in = panels.dim(1);
  // Where a panel ends, its successor among those read next begins.
  constexpr int64_t kAhead = 32;
  const int64_t next = std::max<int64_t>(1, kStrips / kPerPanel) * panels.row_stride - in * kPanelRows;
  const T* weights[kStrips];
  const acc_t<T>* x[kRows];
  V low[kRows][kStrips], high[kRows][kStrips];
  for (int s = 0; s < kStrips; ++s)
    weights[s] =
        panels.as<T>() + (strip + s) / kPerPanel * panels.row_stride + (strip + s) % kPerPanel * kStrip<T>;
  for (int r = 0; r < kRows; ++r) {
    x[r] = work.x + (row + r) * work.stride;
    for (int s = 0; s < kStrips; ++s) low[r][s] = high[r][s] = hn::Zero(d);
  }
  for (int64_t i = 0; i < in; ++i) {
    for (int s = 0; s < kStrips; ++s) {
      // Reads that wait for memory are asked for early: a hardware prefetcher stops at every page.
      __builtin_prefetch(weights[s] + (i + kAhead) * kPanelRows + (i + kAhead < in ? 0 : next));
      const V w0 = load(d, weights[s] + i * kPanelRows, Whole{});
      const V w1 = load(d, weights[s] + i * kPanelRows + kLanes, Whole{});
      for (int r = 0; r < kRows; ++r) {
        const V value = hn::Set(d, x[r][i]);
        low[r][s] = hn::MulAdd(value, w0, low[r][s]);
        high[r][s] = hn::MulAdd(value, w1, high[r][s]);
      }
    }
  }
  for (int s = 0; s < kStrips; ++s)
    for (int r = 0; r < kRows; ++r) {
      HWY_ALIGN acc_t<T> sums[kStrip<T>];
      hn::Store(low[r][s], d, sums);
      hn::Store(high[r][s], d, sums + kLanes);
      finish(work, row + r, (strip + s) * kStrip<T>, sums);
    }
}

// As many strips at a time as hide the latency of a multiply-add, then the rest one by one.
template <typename T, int kRows, int kStrips>
HWY_INLINE void strips(const Work<T>& work, int64_t begin, int64_t end, int64_t row) {
  int64_t strip = begin;
  if constexpr (kStrips > 2)
    for (; strip + kStrips <= end; strip += kStrips) multiply<T, kRows, kStrips>(work, strip, row);
  if constexpr (kStrips > 1)
    for (; strip + 2 <= end; strip += 2) multiply<T, kRows, 2>(work, strip, row);
  for (; strip < end; ++strip) multiply<T, kRows, 1>(work, strip, row);
}

template <typename T>
void panels_of(const Work<T>& work, int64_t first_panel, int64_t last_panel) {
  // Sixteen vector registers hold six rows of one strip, thirty-two hold eight with room to spare.
  constexpr int64_t kMostRows = HWY_MAX_BYTES >= 64 ? 8 : 6, kPerPanel = kPanelRows / kStrip<T>;
  const int64_t begin = first_panel * kPerPanel, end = last_panel * kPerPanel;
  if (work.rows == 1) return strips<T, 1, 4>(work, begin, end, 0);
  if (work.rows == 2) return strips < T, 2, HWY_MAX_BYTES >= 64 ? 4 : 2 > (work, begin, end, 0);
  if (work.rows == 3) return strips<T, 3, 2>(work, begin, end, 0);
  if (work.rows == 4) return strips < T, 4, HWY_MAX_BYTES >= 64 ? 2 : 1 > (work, begin, end, 0);
  // One panel at a time, so that it is still in cache when the next rows need it.
  for (int64_t strip = begin; strip < end; strip += kPerPanel)
    for (int64_t row = 0; row < work.rows;) {
      const int64_t left = work.rows - row, last = strip + kPerPanel;
      const int64_t count =
          left > kMostRows && left < 2 * kMostRows ? (left + 1) / 2 : std::min(left, kMostRows);
      call_with<kMostRows>(count, [&](auto rows) HWY_ATTR { strips<T, rows(), 1>(work, strip, last, row); });
      row += count;
    }
}

// Each thread converts x for itself: cheaper than waiting for another to do it.
template <typename T>
void rows_of(const Tensor& x, const LinearWeight& w, const Tensor& y, int64_t first_panel,
             int64_t last_panel) {
  thread_local Staging<acc_t<T>> staging;
  Work<T> work{&w, nullptr, x.row_stride, x.rows(), &y};
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    work.x = x.as<T>();
  } else {
    acc_t<T>* values = staging.get(static_cast<size_t>(kMaxDecodeRows * x.cols()));
    for (int64_t n = 0; n < x.rows(); ++n)
      load_row(x.as<T>() + n * x.row_stride, values + n * x.cols(), x.cols());
    work.x = values;
    work.stride = x.cols();
  }
  if constexpr (std::is_same_v<T, double>) {
    // For oracles: right is enough, and every count of rows is one more function to compile.
    constexpr int64_t kPerPanel = kPanelRows / kStrip<T>;
    for (int64_t row = 0; row < work.rows; ++row)
      strips<T, 1, 1>(work, first_panel * kPerPanel, last_panel * kPerPanel, row);
  } else {
    panels_of(work, first_panel, last_panel);
  }
}

void linear_rows(const Tensor& x, const LinearWeight& w, const Tensor& y) {
  visit_dtype(x.dtype, [&](auto tag) {
    parallel_for(w.panels.rows(), 1,
                 [&](int64_t begin, int64_t end) { rows_of<decltype(tag)>(x, w, y, begin, end); });
  });
}

}  // namespace kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kernels::cpu {

HWY_EXPORT(linear_rows);

void linear_rows(const Context&, const Tensor& x, const LinearWeight& w, Tensor y) {
  HWY_DYNAMIC_DISPATCH(linear_rows)(x, w, y);
}

namespace {

template <typename T>
void pack(const Tensor& matrix, const Tensor& panels) {
  const int64_t out = matrix.rows(), in = matrix.cols();
  parallel_for(panels.rows(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      T* panel = panels.as<T>() + p * panels.row_stride;
      const int64_t valid = std::min(kPanelRows, out - p * kPanelRows);
      const T* rows = matrix.as<T>() + p * kPanelRows * matrix.row_stride;
      for (int64_t i = 0; i < in; ++i)
        for (int64_t r = 0; r < kPanelRows; ++r)
          panel[i * kPanelRows + r] = r < valid ? rows[r * matrix.row_stride + i] : T{};
    }
  });
}

template <typename T>
void sum_norm(const LinearWeight& w, const Tensor& sums) {
  using Acc = acc_t<T>;
  const int64_t in = w.matrix.cols();
  const auto data = [](const Tensor& x) { return x ? x.as<T>() : nullptr; };
  const T *gain = data(w.norm.gain), *bias = data(w.norm.bias), *own_bias = data(w.bias);
  parallel_for(w.matrix.rows(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      const T* row = w.matrix.as<T>() + o * w.matrix.row_stride;
      Acc of_gain = 0, of_bias = own_bias ? static_cast<Acc>(own_bias[o]) : Acc{0};
      for (int64_t i = 0; i < in; ++i) {
        const auto weight = static_cast<Acc>(row[i]);
        of_gain += weight * static_cast<Acc>(gain[i]);
        if (bias) of_bias += weight * static_cast<Acc>(bias[i]);
      }
      sums.as<Acc>()[o * 2] = of_gain;
      sums.as<Acc>()[o * 2 + 1] = of_bias;
    }
  });
}

}  // namespace

void pack_panels(const Context&, const Tensor& matrix, Tensor& panels) {
  visit_dtype(matrix.dtype, [&](auto tag) { pack<decltype(tag)>(matrix, panels); });
}

void pack_norm(const Context&, const LinearWeight& w, Tensor& sums) {
  visit_dtype(w.matrix.dtype, [&](auto tag) { sum_norm<decltype(tag)>(w, sums); });
}

}  // namespace kernels::cpu
#endif  // HWY_ONCE

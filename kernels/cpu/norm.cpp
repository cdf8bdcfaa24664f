#include "kernels/ops/norm.h"

#include <cmath>

#include "kernels/cpu/rows.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/norm.cpp"
#include <hwy/foreach_target.h>
#include "kernels/cpu/lanes-inl.h"
// clang-format on

#ifndef KERNELS_CPU_NORM_ARGUMENTS_
#define KERNELS_CPU_NORM_ARGUMENTS_
namespace kernels::cpu {

// What the loops over rows read and write; x is the residual's sum in residual_norm.
struct NormForward {
  NormParams params;
  Tensor residual, branch;  // empty in a plain norm
  Tensor x, gain, bias, y, statistics;
};

struct NormBackward {
  NormParams params;
  Tensor dy, x, gain, statistics, dx;
  bool accumulate;
  Tensor dgain, dbias;
};

// The column sums of norm_backward run over strips of this many columns, each by one thread over all rows in
// order; a multiple of every vector's lanes.
inline constexpr int64_t kStrip = 64;

}  // namespace kernels::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace kernels::cpu::HWY_NAMESPACE {

// Sum over a row of (x - mean)^power, power 1 or 2.
template <int kPower, typename T>
acc_t<T> moment(const T* x, int64_t n, acc_t<T> mean) {
  const Lanes<T> d;
  const auto m = hn::Set(d, mean);
  auto sum = hn::Zero(d);
  for_columns(d, n, [&](size_t i, auto extent) HWY_ATTR {
    const auto v = hn::Sub(load(d, x + i, extent, mean), m);
    sum = kPower == 1 ? hn::Add(sum, v) : hn::MulAdd(v, v, sum);
  });
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

template <typename X, typename Y>
void norm_group(const NormParams& params, const X* x, const Y* gain, const Y* bias, Y* y, int64_t n,
                acc_t<Y>* saved) {
  using A = acc_t<Y>;
  const A mean = params.kind == NormKind::layer ? moment<1>(x, n, A(0)) / A(n) : A(0);
  const A r = A(1) / std::sqrt(moment<2>(x, n, mean) / A(n) + A(params.eps));
  const Lanes<Y> d;
  const auto m = hn::Set(d, mean), scale = hn::Set(d, r);
  for_columns(d, n, [&](size_t i, auto extent) HWY_ATTR {
    const auto v = hn::Mul(hn::Sub(load(d, x + i, extent), m), scale);
    const auto g = hn::Mul(v, load(d, gain + i, extent));
    store(d, bias ? hn::Add(g, load(d, bias + i, extent)) : g, y + i, extent);
  });
  if (saved) {
    saved[0] = mean;
    saved[1] = r;
  }
}

template <typename T>
void add_row(const T* a, const T* b, T* sum, int64_t n) {
  const Lanes<T> d;
  for_columns(d, n, [&](size_t i, auto extent) HWY_ATTR {
    store(d, hn::Add(load(d, a + i, extent), load(d, b + i, extent)), sum + i, extent);
  });
}

template <typename X, typename Y>
void forward_rows(const NormForward& f, int64_t begin, int64_t end) {
  const int64_t groups = f.params.groups, n = f.x.cols() / groups;
  const Y* gain = f.gain.as<Y>();
  const Y* bias = f.bias ? f.bias.as<Y>() : nullptr;
  for (int64_t r = begin; r < end; ++r) {
    if constexpr (std::is_same_v<X, Y>)
      if (f.branch) add_row(row<X>(f.residual, r), row<X>(f.branch, r), row<X>(f.x, r), f.x.cols());
    for (int64_t g = 0; g < groups; ++g) {
      auto* saved = f.statistics ? row<acc_t<Y>>(f.statistics, r) + 2 * g : nullptr;
      norm_group(f.params, row<X>(f.x, r) + g * n, gain + g * n, bias ? bias + g * n : nullptr,
                 row<Y>(f.y, r) + g * n, n, saved);
    }
  }
}

// dx = r (h - mean(h) - xhat mean(h xhat)) with h = dy g and xhat = (x - m) r; mean(h) is 0 for rms.
template <typename X, typename Y, typename DX>
void gradient_group(const NormBackward& b, const Y* dy, const X* x, const Y* gain, const acc_t<Y>* saved,
                    DX* dx, int64_t n) {
  using A = acc_t<Y>;
  const Lanes<Y> d;
  const auto m = hn::Set(d, saved[0]), r = hn::Set(d, saved[1]);
  auto sum = hn::Zero(d), dot = hn::Zero(d);
  for_columns(d, n, [&](size_t i, auto extent) HWY_ATTR {
    const auto h = hn::Mul(load(d, dy + i, extent), load(d, gain + i, extent));
    sum = hn::Add(sum, h);
    dot = hn::MulAdd(h, hn::Mul(hn::Sub(load(d, x + i, extent), m), r), dot);
  });
  const A mean_h = b.params.kind == NormKind::layer ? hn::GetLane(hn::SumOfLanes(d, sum)) / A(n) : A(0);
  const auto mh = hn::Set(d, mean_h), slope = hn::Set(d, hn::GetLane(hn::SumOfLanes(d, dot)) / A(n));
  for_columns(d, n, [&](size_t i, auto extent) HWY_ATTR {
    const auto h = hn::Mul(load(d, dy + i, extent), load(d, gain + i, extent));
    const auto xhat = hn::Mul(hn::Sub(load(d, x + i, extent), m), r);
    const auto v = hn::Mul(r, hn::NegMulAdd(xhat, slope, hn::Sub(h, mh)));
    store(d, b.accumulate ? hn::Add(load(d, dx + i, extent), v) : v, dx + i, extent);
  });
}

template <typename X, typename Y, typename DX>
void gradient_rows(const NormBackward& b, int64_t begin, int64_t end) {
  const int64_t groups = b.params.groups, n = b.x.cols() / groups;
  const Y* gain = b.gain.as<Y>();
  for (int64_t r = begin; r < end; ++r)
    for (int64_t g = 0; g < groups; ++g)
      gradient_group(b, row<Y>(b.dy, r) + g * n, row<X>(b.x, r) + g * n, gain + g * n,
                     row<acc_t<Y>>(b.statistics, r) + 2 * g, row<DX>(b.dx, r) + g * n, n);
}

// Adds a strip's sums over all rows to a gradient: dgain += sum dy xhat, dbias += sum dy.
template <typename X, typename Y>
void sum_strip(const NormBackward& b, int64_t group, int64_t first, int64_t columns) {
  using A = acc_t<Y>;
  const Lanes<Y> d;
  A dgain[kStrip] = {}, dbias[kStrip] = {};
  for (int64_t i = 0; i < b.x.rows(); ++i) {
    const A* saved = row<A>(b.statistics, i) + 2 * group;
    const auto m = hn::Set(d, saved[0]), r = hn::Set(d, saved[1]);
    const Y* dy = row<Y>(b.dy, i) + first;
    const X* x = row<X>(b.x, i) + first;
    for_columns(d, columns, [&](size_t c, auto extent) HWY_ATTR {
      const auto g = load(d, dy + c, extent), xhat = hn::Mul(hn::Sub(load(d, x + c, extent), m), r);
      hn::StoreU(hn::MulAdd(g, xhat, hn::LoadU(d, dgain + c)), d, dgain + c);
      if (b.dbias) hn::StoreU(hn::Add(g, hn::LoadU(d, dbias + c)), d, dbias + c);
    });
  }
  for (int64_t c = 0; c < columns; ++c) b.dgain.as<A>()[first + c] += dgain[c];
  for (int64_t c = 0; b.dbias && c < columns; ++c) b.dbias.as<A>()[first + c] += dbias[c];
}

// Strips [begin, end) of the columns, counted through the groups.
template <typename X, typename Y>
void sum_strips(const NormBackward& b, int64_t begin, int64_t end) {
  const int64_t n = b.x.cols() / b.params.groups, strips = (n + kStrip - 1) / kStrip;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t group = s / strips, offset = s % strips * kStrip;
    sum_strip<X, Y>(b, group, group * n + offset, std::min(kStrip, n - offset));
  }
}

// fn<X, Y> for y's type and x of the same or the main type.
template <typename Fn>
void visit_pair(DType x, DType y, Fn&& fn) {
  visit_dtype(y, [&](auto tag) {
    using Y = decltype(tag);
    if (x == y) return fn(Y{}, Y{});
    if constexpr (!std::is_same_v<Y, acc_t<Y>>) fn(acc_t<Y>{}, Y{});
  });
}

void forward_range(const NormForward& f, int64_t begin, int64_t end) {
  visit_pair(f.x.dtype, f.y.dtype,
             [&](auto x, auto y) { forward_rows<decltype(x), decltype(y)>(f, begin, end); });
}

void gradient_range(const NormBackward& b, int64_t begin, int64_t end) {
  visit_pair(b.x.dtype, b.dy.dtype, [&](auto x, auto y) {
    using X = decltype(x);
    using Y = decltype(y);
    if (b.dx.dtype == b.x.dtype) return gradient_rows<X, Y, X>(b, begin, end);
    if constexpr (!std::is_same_v<X, Y>) gradient_rows<X, Y, Y>(b, begin, end);
  });
}

void strips_range(const NormBackward& b, int64_t begin, int64_t end) {
  visit_pair(b.x.dtype, b.dy.dtype,
             [&](auto x, auto y) { sum_strips<decltype(x), decltype(y)>(b, begin, end); });
}

}  // namespace kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kernels::cpu {
HWY_EXPORT(forward_range);
HWY_EXPORT(gradient_range);
HWY_EXPORT(strips_range);

namespace {
void forward(const NormForward& f) {
  const auto fn = HWY_DYNAMIC_DISPATCH(forward_range);
  parallel_rows(f.x.rows(), f.x.cols(), [&](int64_t begin, int64_t end) { fn(f, begin, end); });
}
}  // namespace

void norm(const Context&, const NormParams& params, const Tensor& x, const Tensor& gain, const Tensor& bias,
          Tensor y, Tensor statistics) {
  forward({.params = params,
           .residual = {},
           .branch = {},
           .x = x,
           .gain = gain,
           .bias = bias,
           .y = y,
           .statistics = statistics});
}

void residual_norm(const Context&, const NormParams& params, const Tensor& residual, const Tensor& branch,
                   const Tensor& gain, const Tensor& bias, Tensor sum, Tensor y, Tensor statistics) {
  forward({.params = params,
           .residual = residual,
           .branch = branch,
           .x = sum,
           .gain = gain,
           .bias = bias,
           .y = y,
           .statistics = statistics});
}

void norm_backward(const Context&, const NormParams& params, const Tensor& dy, const Tensor& x,
                   const Tensor& gain, const Tensor& statistics, Tensor dx, bool accumulate, Tensor dgain,
                   Tensor dbias) {
  const NormBackward b = {params, dy, x, gain, statistics, dx, accumulate, dgain, dbias};
  const int64_t groups = params.groups, strips = (x.cols() / groups + kStrip - 1) / kStrip;
  if (dgain) {
    const auto fn = HWY_DYNAMIC_DISPATCH(strips_range);
    parallel_for(groups * strips, 1, [&](int64_t begin, int64_t end) { fn(b, begin, end); });
  }
  const auto fn = HWY_DYNAMIC_DISPATCH(gradient_range);
  parallel_rows(x.rows(), x.cols(), [&](int64_t begin, int64_t end) { fn(b, begin, end); });
}

}  // namespace kernels::cpu
#endif

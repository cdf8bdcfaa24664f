// Vectors of the accumulation type over rows of any floating-point type: fp16 and bf16 are converted in
// registers. Compiled once for each instruction set (Highway): include it after hwy/foreach_target.h, inside
// a file that names itself HWY_TARGET_INCLUDE. A row is read in the same steps wherever it lies in memory, so
// its result depends on its values alone.
#if defined(KERNELS_CPU_LANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KERNELS_CPU_LANES_INL_H_
#undef KERNELS_CPU_LANES_INL_H_
#else
#define KERNELS_CPU_LANES_INL_H_
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/core/dtype.h"

HWY_BEFORE_NAMESPACE();
namespace kernels::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// The vector tag for elements of type T.
template <typename T>
using Lanes = hn::ScalableTag<acc_t<T>>;

// How much of a vector a step covers: all of it, or the first `count` lanes at the end of a row.
struct Whole {};
struct Part {
  size_t count;
};

template <class D>
HWY_INLINE hn::Vec<D> load(D d, const hn::TFromD<D>* p, Whole) {
  return hn::LoadU(d, p);
}
template <class D>
HWY_INLINE hn::Vec<D> load(D d, const f16* p, Whole) {
  const hn::Rebind<hwy::float16_t, D> half;
  return hn::PromoteTo(d, hn::LoadU(half, reinterpret_cast<const hwy::float16_t*>(p)));
}
template <class D>
HWY_INLINE hn::Vec<D> load(D d, const bf16* p, Whole) {
  const hn::Rebind<uint16_t, D> half;
  const hn::Rebind<uint32_t, D> bits;
  const auto u = hn::PromoteTo(bits, hn::LoadU(half, reinterpret_cast<const uint16_t*>(p)));
  return hn::BitCast(d, hn::ShiftLeft<16>(u));
}
// Lanes beyond the part hold `fill`.
template <class D, typename T>
HWY_INLINE hn::Vec<D> load(D d, const T* p, Part part, hn::TFromD<D> fill = 0) {
  constexpr size_t kMost = HWY_MAX_BYTES / sizeof(hn::TFromD<D>);
  T staged[kMost] = {};
  std::memcpy(staged, p, std::min(part.count, kMost) * sizeof(T));
  // Not by way of T, which would round it.
  return hn::IfThenElse(hn::FirstN(d, part.count), load(d, staged, Whole{}), hn::Set(d, fill));
}
template <class D, typename T>
HWY_INLINE hn::Vec<D> load(D d, const T* p, Whole whole, hn::TFromD<D>) {
  return load(d, p, whole);
}

template <class D>
HWY_INLINE void store(D d, hn::Vec<D> v, hn::TFromD<D>* p, Whole) {
  hn::StoreU(v, d, p);
}
template <class D>
HWY_INLINE void store(D d, hn::Vec<D> v, f16* p, Whole) {
  (void)d;
  const hn::Rebind<hwy::float16_t, D> half;
  hn::StoreU(hn::DemoteTo(half, v), half, reinterpret_cast<hwy::float16_t*>(p));
}
template <class D>
HWY_INLINE void store(D, hn::Vec<D> v, bf16* p, Whole) {
  const hn::Rebind<uint16_t, D> half;
  const hn::Rebind<uint32_t, D> bits;
  const auto u = hn::BitCast(bits, v);
  const auto odd = hn::And(hn::ShiftRight<16>(u), hn::Set(bits, 1));
  const auto rounded = hn::Add(u, hn::Add(odd, hn::Set(bits, 0x7fff)));
  const auto quiet = hn::Or(u, hn::Set(bits, 0x400000));  // a NaN must not round to infinity
  const auto nan = hn::RebindMask(bits, hn::IsNaN(v));
  const auto upper = hn::ShiftRight<16>(hn::IfThenElse(nan, quiet, rounded));
  hn::StoreU(hn::DemoteTo(half, hn::BitCast(hn::Rebind<int32_t, D>(), upper)), half,
             reinterpret_cast<uint16_t*>(p));
}
template <class D, typename T>
HWY_INLINE void store(D d, hn::Vec<D> v, T* p, Part part) {
  T staged[HWY_MAX_BYTES / sizeof(hn::TFromD<D>)];
  store(d, v, staged, Whole{});
  std::memcpy(p, staged, part.count * sizeof(T));
}

// Calls fn(offset, Whole or Part) over n columns. fn must be marked HWY_ATTR.
template <class D, typename Fn>
HWY_INLINE void for_columns(D d, int64_t n, Fn&& fn) {
  const size_t count = static_cast<size_t>(n), lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) fn(i, Whole{});
  if (i < count) fn(i, Part{count - i});
}

// Calls fn(std::integral_constant<int, count>()), 1 <= count <= kMost. fn must be marked HWY_ATTR.
template <int kMost, class Fn>
HWY_INLINE void call_with(int64_t count, Fn&& fn) {
  if constexpr (kMost > 1) {
    if (count < kMost) return call_with<kMost - 1>(count, fn);
  }
  fn(std::integral_constant<int, kMost>());
}

// exp over the whole line, within 2 units in the last place: infinity from about 88.4 (fp32) on, 0 where the
// result is not a normal number, NaN stays NaN.
//   exp(x) = 2^n exp(r), n = round(x / ln 2), r = x - n ln 2 in [-ln 2 / 2, ln 2 / 2]
// exp(r) = 1 + r + r^2 q(r), q fitted for the smallest relative error over that interval (3e-9).
template <class D>
requires(sizeof(hn::TFromD<D>) == 4) HWY_INLINE hn::Vec<D> exponential(D d, hn::Vec<D> x) {
  // Adding 1.5 2^23 leaves the nearest integer in the low bits; 127 more is the bias of the exponent.
  const auto shift = hn::Set(d, 0x1.8p23f + 127), log2_e = hn::Set(d, 1.44269504f);
  const auto lowest = hn::Set(d, -87.3365f), highest = hn::Set(d, 88.7f);
  // The first argument is dropped where it is NaN, the second kept.
  const auto clamped = hn::Min(highest, hn::Max(lowest, x));
  const auto biased = hn::MulAdd(clamped, log2_e, shift), n = hn::Sub(biased, shift);
  auto r = hn::NegMulAdd(n, hn::Set(d, 0.693145751953125f), clamped);
  r = hn::NegMulAdd(n, hn::Set(d, 1.42860677e-6f), r);
  auto q = hn::MulAdd(r, hn::Set(d, 0.00138145394f), hn::Set(d, 0.00836874545f));
  q = hn::MulAdd(q, r, hn::Set(d, 0.041668389f));
  q = hn::MulAdd(q, r, hn::Set(d, 0.166665211f));
  q = hn::MulAdd(q, r, hn::Set(d, 0.49999994f));
  const auto e = hn::MulAdd(hn::MulAdd(q, r, hn::Set(d, 1.0f)), r, hn::Set(d, 1.0f));
  const hn::RebindToUnsigned<D> bits;
  const auto power = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(bits, biased)));
  return hn::IfThenZeroElse(hn::Lt(x, lowest), hn::Mul(e, power));
}
template <class D>
requires(sizeof(hn::TFromD<D>) == 8) HWY_INLINE hn::Vec<D> exponential(D d, hn::Vec<D> x) {
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(d, hn::Min(x, hn::Set(d, 710))));
}

// 1 / (1 + exp(-x)).
template <class D>
HWY_INLINE hn::Vec<D> sigmoid(D d, hn::Vec<D> x) {
  const auto one = hn::Set(d, 1);
  return hn::Div(one, hn::Add(one, exponential(d, hn::Neg(x))));
}

// The largest of n values, NaN left aside; -infinity when there is none.
template <typename T>
acc_t<T> row_max(const T* x, int64_t n) {
  const Lanes<T> d;
  constexpr auto kLowest = -std::numeric_limits<acc_t<T>>::infinity();
  auto best = hn::Set(d, kLowest);
  for_columns(d, n, [&](size_t i, auto extent) HWY_ATTR {
    const auto v = load(d, x + i, extent, kLowest);
    best = hn::IfThenElse(hn::Gt(v, best), v, best);
  });
  return hn::GetLane(hn::MaxOfLanes(d, best));
}

// sum of exp((x - max) * scale).
template <typename T>
acc_t<T> row_exp_sum(const T* x, int64_t n, acc_t<T> max, acc_t<T> scale) {
  const Lanes<T> d;
  constexpr auto kLowest = -std::numeric_limits<acc_t<T>>::infinity();
  const auto m = hn::Set(d, max), s = hn::Set(d, scale);
  auto sum = hn::Zero(d);
  for_columns(d, n, [&](size_t i, auto extent) HWY_ATTR {
    sum = hn::Add(sum, exponential(d, hn::Mul(hn::Sub(load(d, x + i, extent, kLowest), m), s)));
  });
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

}  // namespace kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

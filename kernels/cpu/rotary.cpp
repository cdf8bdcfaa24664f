#include "kernels/ops/rotary.h"

#include <fmt/format.h>

#include "kernels/cpu/rotary_table.h"
#include "kernels/cpu/rows.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rotary.cpp"
#include <hwy/foreach_target.h>
#include "kernels/cpu/lanes-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kernels::cpu::HWY_NAMESPACE {

template <typename T>
void rotate_head(T* x, const acc_t<T>* cosines, const acc_t<T>* sines, acc_t<T> direction, int64_t half) {
  const Lanes<T> d;
  const auto sign = hn::Set(d, direction);
  for_columns(d, half, [&](size_t i, auto extent) HWY_ATTR {
    const auto c = load(d, cosines + i, extent), s = hn::Mul(load(d, sines + i, extent), sign);
    const auto x1 = load(d, x + i, extent), x2 = load(d, x + half + i, extent);
    store(d, hn::NegMulAdd(x2, s, hn::Mul(x1, c)), x + i, extent);
    store(d, hn::MulAdd(x1, s, hn::Mul(x2, c)), x + half + i, extent);
  });
}

template <typename T>
void rotate_rows(const Tensor& x, const int32_t* positions, const RotaryTable<acc_t<T>>& table, int direction,
                 int64_t begin, int64_t end) {
  const int64_t heads = x.dim(1), half = x.dim(2) / 2;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t h = 0; h < heads; ++h)
      rotate_head(row<T>(x, i) + h * 2 * half, table.cosines(positions[i]), table.sines(positions[i]),
                  acc_t<T>(direction), half);
}

void rotate_range(const Tensor& x, const int32_t* positions, const void* table, int direction, int64_t begin,
                  int64_t end) {
  visit_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    rotate_rows<T>(x, positions, *static_cast<const RotaryTable<acc_t<T>>*>(table), direction, begin, end);
  });
}

}  // namespace kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kernels::cpu {
HWY_EXPORT(rotate_range);

void rotary(const Context&, Tensor x, const Tensor& positions, float theta, int direction) {
  const auto* position = positions.as<int32_t>();
  int64_t count = 0;
  for (int64_t i = 0; i < x.rows(); ++i) {
    if (position[i] < 0)
      throw ShapeError(fmt::format("rotary: position {} of row {} is negative", position[i], i));
    count = std::max<int64_t>(count, position[i] + int64_t{1});
  }
  visit_dtype(x.dtype, [&](auto tag) {
    const auto table = rotary_table<acc_t<decltype(tag)>>(theta, x.dim(2) / 2, count);
    const auto fn = HWY_DYNAMIC_DISPATCH(rotate_range);
    parallel_rows(x.rows(), x.cols(),
                  [&](int64_t begin, int64_t end) { fn(x, position, table.get(), direction, begin, end); });
  });
}

}  // namespace kernels::cpu
#endif

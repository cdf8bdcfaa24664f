#include "kernels/ops/activation.h"

#include "kernels/cpu/rows.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/activation.cpp"
#include <hwy/foreach_target.h>
#include "kernels/cpu/lanes-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kernels::cpu::HWY_NAMESPACE {

// The element-wise functions, over vectors of the accumulation type. Reading a gate and an up value, swiglu
// has two gradients; it stands apart below.
struct Gelu {
  // The tanh form equals x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3).
  template <class D, class V>
  static HWY_INLINE V twice_u(D d, V x) {
    const auto cubic = hn::MulAdd(hn::Mul(hn::Set(d, kCubic), x), x, hn::Set(d, 1));
    return hn::Mul(hn::Mul(hn::Set(d, kTwiceRoot), x), cubic);
  }
  template <class D, class V>
  static HWY_INLINE V value(D d, V x) {
    return hn::Mul(x, sigmoid(d, twice_u(d, x)));
  }
  template <class D, class V>
  static HWY_INLINE V slope(D d, V x) {
    const auto one = hn::Set(d, 1), s = sigmoid(d, twice_u(d, x));
    const auto inner = hn::MulAdd(hn::Mul(hn::Set(d, 3 * kCubic), x), x, one);
    const auto tail = hn::Mul(hn::Mul(x, hn::Mul(s, hn::Sub(one, s))), hn::Set(d, kTwiceRoot));
    return hn::MulAdd(tail, inner, s);
  }
  static constexpr double kCubic = 0.044715, kTwiceRoot = 2 * 0.79788456080286535588;
};

struct Silu {
  template <class D, class V>
  static HWY_INLINE V value(D d, V x) {
    return hn::Mul(x, sigmoid(d, x));
  }
  template <class D, class V>
  static HWY_INLINE V slope(D d, V x) {
    const auto one = hn::Set(d, 1), s = sigmoid(d, x);
    return hn::Mul(s, hn::MulAdd(x, hn::Sub(one, s), one));
  }
};

struct GeluValue {
  template <class D, class V>
  static HWY_INLINE V of(D d, V x, V) {
    return Gelu::value(d, x);
  }
};
struct GeluGradient {
  template <class D, class V>
  static HWY_INLINE V of(D d, V dy, V x) {
    return hn::Mul(dy, Gelu::slope(d, x));
  }
};
struct SiluAdd {
  template <class D, class V>
  static HWY_INLINE V of(D d, V x, V u) {
    return hn::Add(x, Silu::value(d, u));
  }
};
struct SiluGradient {
  template <class D, class V>
  static HWY_INLINE V of(D d, V dy, V u) {
    return hn::Mul(dy, Silu::slope(d, u));
  }
};
struct Sum {
  template <class D, class V>
  static HWY_INLINE V of(D, V a, V b) {
    return hn::Add(a, b);
  }
};
struct Swiglu {
  template <class D, class V>
  static HWY_INLINE V of(D d, V a, V b) {
    return hn::Mul(Silu::value(d, a), b);
  }
};

// y = F(a, b) on rows [begin, end).
template <class F, typename T>
void binary_rows(const Tensor& a, const Tensor& b, const Tensor& y, int64_t begin, int64_t end) {
  const Lanes<T> d;
  for (int64_t r = begin; r < end; ++r) {
    const T *pa = row<T>(a, r), *pb = row<T>(b, r);
    T* py = row<T>(y, r);
    for_columns(d, y.cols(), [&](size_t i, auto extent) HWY_ATTR {
      store(d, F::of(d, load(d, pa + i, extent), load(d, pb + i, extent)), py + i, extent);
    });
  }
}

template <typename T>
void swiglu_gradient_rows(const Tensor& dy, const Tensor& x, const Tensor& dx, int64_t begin, int64_t end) {
  const Lanes<T> d;
  const int64_t width = dy.cols();
  for (int64_t r = begin; r < end; ++r) {
    const T *pdy = row<T>(dy, r), *pa = row<T>(x, r), *pb = pa + width;
    T *pda = row<T>(dx, r), *pdb = pda + width;
    for_columns(d, width, [&](size_t i, auto extent) HWY_ATTR {
      const auto g = load(d, pdy + i, extent), a = load(d, pa + i, extent), b = load(d, pb + i, extent);
      const auto one = hn::Set(d, 1), s = sigmoid(d, a);
      store(d, hn::Mul(g, hn::Mul(a, s)), pdb + i, extent);
      store(d, hn::Mul(hn::Mul(g, b), hn::Mul(s, hn::MulAdd(a, hn::Sub(one, s), one))), pda + i, extent);
    });
  }
}

template <class F>
void binary(const Tensor& a, const Tensor& b, const Tensor& y, int64_t begin, int64_t end) {
  visit_dtype(y.dtype, [&](auto tag) { binary_rows<F, decltype(tag)>(a, b, y, begin, end); });
}

void gelu_range(const Tensor& x, const Tensor& unused, const Tensor& y, int64_t begin, int64_t end) {
  binary<GeluValue>(x, unused, y, begin, end);
}
void gelu_gradient(const Tensor& dy, const Tensor& x, const Tensor& dx, int64_t begin, int64_t end) {
  binary<GeluGradient>(dy, x, dx, begin, end);
}
void silu_add_range(const Tensor& x, const Tensor& u, const Tensor& y, int64_t begin, int64_t end) {
  binary<SiluAdd>(x, u, y, begin, end);
}
void silu_gradient(const Tensor& dy, const Tensor& u, const Tensor& du, int64_t begin, int64_t end) {
  binary<SiluGradient>(dy, u, du, begin, end);
}
void add_range(const Tensor& a, const Tensor& b, const Tensor& y, int64_t begin, int64_t end) {
  binary<Sum>(a, b, y, begin, end);
}
void swiglu_range(const Tensor& a, const Tensor& b, const Tensor& y, int64_t begin, int64_t end) {
  binary<Swiglu>(a, b, y, begin, end);
}
void swiglu_gradient(const Tensor& dy, const Tensor& x, const Tensor& dx, int64_t begin, int64_t end) {
  visit_dtype(dy.dtype, [&](auto tag) { swiglu_gradient_rows<decltype(tag)>(dy, x, dx, begin, end); });
}

}  // namespace kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kernels::cpu {
HWY_EXPORT(gelu_range);
HWY_EXPORT(gelu_gradient);
HWY_EXPORT(silu_add_range);
HWY_EXPORT(silu_gradient);
HWY_EXPORT(add_range);
HWY_EXPORT(swiglu_range);
HWY_EXPORT(swiglu_gradient);

namespace {
using RangeFn = void (*)(const Tensor& a, const Tensor& b, const Tensor& y, int64_t begin, int64_t end);
void over_rows(RangeFn fn, const Tensor& a, const Tensor& b, const Tensor& y) {
  parallel_rows(y.rows(), y.cols(), [&](int64_t begin, int64_t end) { fn(a, b, y, begin, end); });
}
}  // namespace

void swiglu(const Context&, const Tensor& x, Tensor y) {
  const int64_t width = y.cols();
  over_rows(HWY_DYNAMIC_DISPATCH(swiglu_range), x.columns(0, width), x.columns(width, width), y);
}
void swiglu_backward(const Context&, const Tensor& dy, const Tensor& x, Tensor dx) {
  over_rows(HWY_DYNAMIC_DISPATCH(swiglu_gradient), dy, x, dx);
}
void gelu(const Context&, const Tensor& x, Tensor y) { over_rows(HWY_DYNAMIC_DISPATCH(gelu_range), x, x, y); }
void gelu_backward(const Context&, const Tensor& dy, const Tensor& x, Tensor dx) {
  over_rows(HWY_DYNAMIC_DISPATCH(gelu_gradient), dy, x, dx);
}
void silu_add(const Context&, const Tensor& x, const Tensor& u, Tensor y) {
  over_rows(HWY_DYNAMIC_DISPATCH(silu_add_range), x, u, y);
}
void silu_add_backward(const Context&, const Tensor& dy, const Tensor& u, Tensor du) {
  over_rows(HWY_DYNAMIC_DISPATCH(silu_gradient), dy, u, du);
}
void add(const Context&, const Tensor& a, const Tensor& b, Tensor y) {
  over_rows(HWY_DYNAMIC_DISPATCH(add_range), a, b, y);
}

}  // namespace kernels::cpu
#endif

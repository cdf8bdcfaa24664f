#include "comm/ordered_reduce.h"

#include <algorithm>
#include <array>

namespace comm {
namespace {

template <typename T>
T larger(T a, T b) {
  return a < b || b != b ? b : a;  // a NaN on either side stays
}

template <typename T>
void reduce(Reduce op, std::span<const void* const> parts, T* out, int64_t count) {
  constexpr int64_t kBlock = 1024;  // stays in the first-level cache
  std::array<T, kBlock> sums;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t n = std::min(kBlock, count - begin);
    std::copy_n(static_cast<const T*>(parts[0]) + begin, n, sums.data());
    for (size_t r = 1; r < parts.size(); ++r) {
      const T* part = static_cast<const T*>(parts[r]) + begin;
      if (op == Reduce::sum)
        for (int64_t i = 0; i < n; ++i) sums[i] += part[i];
      else
        for (int64_t i = 0; i < n; ++i) sums[i] = larger(sums[i], part[i]);
    }
    std::copy_n(sums.data(), n, out + begin);
  }
}

}  // namespace

void ordered_reduce(kernels::DType dtype, Reduce op, std::span<const void* const> parts, void* out,
                    int64_t count) {
  using kernels::DType;
  switch (dtype) {
    case DType::f32:
      return reduce(op, parts, static_cast<float*>(out), count);
    case DType::f64:
      return reduce(op, parts, static_cast<double*>(out), count);
    case DType::i32:
      return reduce(op, parts, static_cast<int32_t*>(out), count);
    case DType::i64:
      return reduce(op, parts, static_cast<int64_t*>(out), count);
    default:
      throw kernels::ShapeError("all_reduce: use fp32, fp64, int32 or int64");
  }
}

}  // namespace comm

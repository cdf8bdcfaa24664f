#include "kernels/ops/embedding.h"

#include <fmt/format.h>

#include <cstring>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/rows.h"

namespace kernels::cpu {

namespace {

// Columns of a gradient that one thread owns: whole cache lines.
constexpr int64_t kColumnGrain = 64;

void check_range(const char* operation, const char* what, const Tensor& indices, int64_t size) {
  const auto* index = indices.as<int32_t>();
  for (int64_t i = 0; i < indices.numel(); ++i)
    if (index[i] >= size)
      throw ShapeError(fmt::format("{}: {} {} of row {} is beyond the table's {} rows", operation, what,
                                   index[i], i, size));
}

template <typename T>
void lookup_row(int32_t token, int32_t position, const Tensor& table, const Tensor& position_table, T* y) {
  const int64_t cols = table.cols();
  if (token < 0) {
    std::memset(static_cast<void*>(y), 0, static_cast<size_t>(cols) * sizeof(T));
    return;
  }
  const T* e = row<T>(table, token);
  if (!position_table || position < 0) {
    std::memcpy(static_cast<void*>(y), e, static_cast<size_t>(cols) * sizeof(T));
    return;
  }
  const T* p = row<T>(position_table, position);
  for (int64_t c = 0; c < cols; ++c) y[c] = T(acc_t<T>(e[c]) + acc_t<T>(p[c]));
}

// dtable[index[i]] += dy[i] on columns [begin, end), in order of i, where keep[i] >= 0 and index[i] >= 0.
template <typename T>
void scatter_add(const Tensor& dy, const int32_t* index, const int32_t* keep, const Tensor& dtable,
                 int64_t begin, int64_t end) {
  for (int64_t i = 0; i < dy.rows(); ++i) {
    if (index[i] < 0 || keep[i] < 0) continue;
    const T* g = row<T>(dy, i);
    auto* sum = row<acc_t<T>>(dtable, index[i]);
    for (int64_t first = begin; first < end; first += kColumnGrain) {
      const int64_t count = std::min(kColumnGrain, end - first);
      acc_t<T> wide[kColumnGrain];
      load_row(g + first, wide, count);
      for (int64_t c = 0; c < count; ++c) sum[first + c] += wide[c];
    }
  }
}

}  // namespace

void embedding(const Context&, const Tensor& tokens, const Tensor& table, const Tensor& positions,
               const Tensor& position_table, Tensor y) {
  check_range("embedding", "token", tokens, table.rows());
  if (position_table) check_range("embedding", "position", positions, position_table.rows());
  const auto* token = tokens.as<int32_t>();
  const auto* position = position_table ? positions.as<int32_t>() : token;
  visit_dtype(y.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_rows(y.rows(), y.cols(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        lookup_row<T>(token[i], position[i], table, position_table, row<T>(y, i));
    });
  });
}

void embedding_backward(const Context&, const Tensor& dy, const Tensor& tokens, Tensor dtable,
                        const Tensor& positions, Tensor dposition_table) {
  check_range("embedding_backward", "token", tokens, dtable.rows());
  if (dposition_table) check_range("embedding_backward", "position", positions, dposition_table.rows());
  const auto* token = tokens.as<int32_t>();
  visit_dtype(dy.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(dy.cols(), kColumnGrain, [&](int64_t begin, int64_t end) {
      scatter_add<T>(dy, token, token, dtable, begin, end);
      if (dposition_table) scatter_add<T>(dy, positions.as<int32_t>(), token, dposition_table, begin, end);
    });
  });
}

}  // namespace kernels::cpu

#include "kernels/core/tensor.h"

#include <fmt/format.h>

namespace kernels {

Shape::Shape(std::initializer_list<int64_t> dims) : rank_(static_cast<int>(dims.size())) {
  if (dims.size() > kMaxRank) throw ShapeError(fmt::format("a shape has at most {} dimensions", kMaxRank));
  int i = 0;
  for (int64_t d : dims) dims_[i++] = d;
}

int64_t Shape::numel() const {
  int64_t n = rank_ == 0 ? 0 : 1;
  for (int i = 0; i < rank_; ++i) n *= dims_[i];
  return n;
}

std::string to_string(const Shape& shape) {
  std::string s = "(";
  for (int i = 0; i < shape.rank(); ++i) s += fmt::format("{}{}", i ? ", " : "", shape[i]);
  return s + ")";
}

std::string to_string(const Tensor& t) { return fmt::format("{} {}", name_of(t.dtype), to_string(t.shape)); }

bool rows_aligned(const Tensor& t, size_t bytes) {
  const bool one_row = t.rows() <= 1 || (t.shape.rank() == 1 && t.dense());
  return reinterpret_cast<uintptr_t>(t.data) % bytes == 0 &&
         (one_row || static_cast<size_t>(t.row_stride) * size_of(t.dtype) % bytes == 0);
}

Tensor::Tensor(void* data, DType dtype, Shape shape, Device device)
    : data(data), dtype(dtype), device(device), shape(shape) {
  row_stride = cols();
}

int64_t Tensor::cols() const {
  int64_t n = 1;
  for (int i = 1; i < shape.rank(); ++i) n *= shape[i];
  return n;
}

void Tensor::wrong_type(DType expected) const {
  throw ShapeError(fmt::format("a tensor is {}, expected {}", name_of(dtype), name_of(expected)));
}

Tensor Tensor::slice(int64_t begin, int64_t count) const {
  if (begin < 0 || count < 0 || begin + count > rows())
    throw ShapeError(fmt::format("rows {} to {} of a tensor {}", begin, begin + count, to_string(shape)));
  Tensor t = *this;
  t.data = static_cast<char*>(data) + static_cast<size_t>(begin * row_stride) * size_of(dtype);
  t.shape[0] = count;
  return t;
}

Tensor Tensor::columns(int64_t begin, int64_t count) const {
  if (begin < 0 || count < 0 || begin + count > cols())
    throw ShapeError(fmt::format("columns {} to {} of a tensor {}", begin, begin + count, to_string(shape)));
  Tensor t = *this;
  t.data = static_cast<char*>(data) + static_cast<size_t>(begin) * size_of(dtype);
  t.shape = Shape{rows(), count};
  return t;
}

Tensor Tensor::view(Shape other) const {
  Tensor t = *this;
  t.shape = other;
  const bool keeps_rows = other.rank() > 0 && other[0] == rows();
  if (other.numel() != numel() || (!dense() && !keeps_rows))
    throw ShapeError(fmt::format("a tensor {} cannot be seen as {}", to_string(shape), to_string(other)));
  if (!keeps_rows) t.row_stride = t.cols();
  return t;
}

void check_shape(const char* operation, const char* argument, const Tensor& given, const Shape& expected) {
  if (given.shape == expected) return;
  throw ShapeError(
      fmt::format("{}: {} is {}, expected {}", operation, argument, to_string(given), to_string(expected)));
}

void check_dtype(const char* operation, const char* argument, const Tensor& given, DType expected) {
  if (given.dtype == expected) return;
  throw ShapeError(
      fmt::format("{}: {} is {}, expected {}", operation, argument, to_string(given), name_of(expected)));
}

}  // namespace kernels

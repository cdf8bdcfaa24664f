#pragma once
// A non-owning view of an array: data, type, device, shape. Dense in C order, except that dimension 0 may
// have a larger stride, so that q, k and v can be column blocks of one matrix. Copying a Tensor copies the
// view.
#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "kernels/core/device.h"
#include "kernels/core/dtype.h"

namespace kernels {

class Shape {
 public:
  static constexpr int kMaxRank = 4;
  Shape() = default;
  Shape(std::initializer_list<int64_t> dims);
  int rank() const { return rank_; }
  int64_t operator[](int i) const { return dims_[i]; }
  int64_t& operator[](int i) { return dims_[i]; }
  int64_t numel() const;
  bool operator==(const Shape&) const = default;

 private:
  std::array<int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};
std::string to_string(const Shape& shape);  // "(32, 4, 64)"

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  Device device;
  Shape shape;
  int64_t row_stride = 0;  // elements between successive indices of dimension 0

  Tensor() = default;
  // Dense tensor over data.
  Tensor(void* data, DType dtype, Shape shape, Device device = {});

  explicit operator bool() const { return data != nullptr; }
  int64_t dim(int i) const { return shape[i]; }
  int64_t rows() const { return shape.rank() == 0 ? 0 : shape[0]; }
  int64_t cols() const;  // elements of one row: the product of every dimension but the first
  int64_t numel() const { return shape.numel(); }
  bool dense() const { return row_stride == cols(); }
  size_t bytes() const { return static_cast<size_t>(numel()) * size_of(dtype); }

  // The typed pointer; ShapeError when T is not the tensor's type.
  template <typename T>
  T* as() const {
    if (dtype_of<T>() != dtype) wrong_type(dtype_of<T>());
    return static_cast<T*>(data);
  }
  // Rows [begin, begin + count).
  Tensor slice(int64_t begin, int64_t count) const;
  // Columns [begin, begin + count) of each row: (N, count), stride kept.
  Tensor columns(int64_t begin, int64_t count) const;
  // Another shape over the same elements. A strided tensor keeps dimension 0 and may only split or merge the
  // rest.
  Tensor view(Shape shape) const;

 private:
  [[noreturn]] void wrong_type(DType expected) const;
};
std::string to_string(const Tensor& t);  // "fp16 (32, 256)"

// Whether every row begins at a multiple of `bytes`. A dense tensor of rank one counts as one row.
bool rows_aligned(const Tensor& t, size_t bytes);

// Argument checks of operations: "<operation>: <argument> is fp16 (3, 4), expected fp16 (3, 5)".
void check_shape(const char* operation, const char* argument, const Tensor& given, const Shape& expected);
void check_dtype(const char* operation, const char* argument, const Tensor& given, DType expected);

}  // namespace kernels

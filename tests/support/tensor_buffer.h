#pragma once
// Owning storage for tests. Values travel as double, row by row and without padding, so that one table of
// numbers can be run in every type and on every device.
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/core/tensor.h"

namespace support {

class TensorBuffer {
 public:
  TensorBuffer() = default;
  // padding: unused columns behind each row, so that the tensor has strided rows. Starts poisoned.
  TensorBuffer(kernels::DType dtype, kernels::Shape shape, kernels::Device device = {}, int64_t padding = 0);

  const kernels::Tensor& tensor() const { return tensor_; }
  operator const kernels::Tensor&() const { return tensor_; }

  // NaN in every floating-point element and in the padding; a large negative number in integer ones.
  void poison();
  // Writes values (numel of them), rounded to the type; the padding stays as it is.
  void set(std::span<const double> values);
  void set(size_t index, double value);
  std::vector<double> values() const;
  // Seeded normal values, the same for every type up to rounding.
  void fill_normal(uint64_t seed, double scale = 1, double offset = 0);
  // False when an operation wrote behind the end of a row.
  bool padding_intact() const;
  // The bytes of the elements and the padding, for bitwise comparison.
  std::vector<char> bytes() const;

 private:
  size_t size() const;
  std::vector<char> host() const;
  void upload(const std::vector<char>& host);

  kernels::Tensor tensor_;
  std::shared_ptr<void> storage_;
};

// A buffer that holds these values.
TensorBuffer buffer_of(kernels::DType dtype, kernels::Shape shape, const std::vector<double>& values,
                       kernels::Device device = {}, int64_t padding = 0);
std::vector<double> normal_values(size_t count, uint64_t seed, double scale = 1, double offset = 0);
// The buffer's values in another type.
TensorBuffer converted(const TensorBuffer& from, kernels::DType dtype);
// Copies the elements of a dense tensor to another of the same type and shape, on any device.
void copy(const kernels::Tensor& from, const kernels::Tensor& to);

}  // namespace support

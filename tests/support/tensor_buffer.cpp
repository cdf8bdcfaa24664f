#include "tests/support/tensor_buffer.h"

#include <cstring>
#include <limits>
#include <stdexcept>

#include "kernels/core/philox.h"

namespace support {

using kernels::bf16;
using kernels::DType;
using kernels::f16;
using kernels::Tensor;

namespace {

// Calls fn with a value of the C++ type behind any dtype.
template <typename Fn>
void visit(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::i32:
      return fn(int32_t{});
    case DType::i64:
      return fn(int64_t{});
    case DType::u8:
      return fn(uint8_t{});
    default:
      return kernels::visit_dtype(dtype, fn);
  }
}

template <typename T>
T poison_value() {
  if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>)
    return T(std::numeric_limits<float>::quiet_NaN());
  else if constexpr (std::is_floating_point_v<T>)
    return std::numeric_limits<T>::quiet_NaN();
  else
    return static_cast<T>(-0x5a5a5a5a);
}

template <typename T>
T from_double(double value) {
  return static_cast<T>(value);
}

}  // namespace

TensorBuffer::TensorBuffer(DType dtype, kernels::Shape shape, kernels::Device device, int64_t padding)
    : tensor_(nullptr, dtype, shape, device) {
  tensor_.row_stride += padding;
  storage_ = std::shared_ptr<void>(kernels::allocate_bytes(device, size() + 64),
                                   [device](void* p) { kernels::free_bytes(device, p); });
  tensor_.data = storage_.get();
  poison();
}

size_t TensorBuffer::size() const {
  return static_cast<size_t>(tensor_.rows() * tensor_.row_stride) * size_of(tensor_.dtype);
}

std::vector<char> TensorBuffer::host() const {
  std::vector<char> host(size());
  kernels::copy_bytes(host.data(), {}, tensor_.data, tensor_.device, host.size());
  return host;
}

void TensorBuffer::upload(const std::vector<char>& host) {
  kernels::copy_bytes(tensor_.data, tensor_.device, host.data(), {}, host.size());
}

std::vector<char> TensorBuffer::bytes() const { return host(); }

void TensorBuffer::poison() {
  std::vector<char> data(size());  // what stands there now has perhaps never been written
  visit(tensor_.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T value = poison_value<T>();
    for (size_t i = 0; i < data.size(); i += sizeof(T)) std::memcpy(&data[i], &value, sizeof(T));
  });
  upload(data);
}

void TensorBuffer::set(std::span<const double> values) {
  if (values.size() != static_cast<size_t>(tensor_.numel()))
    throw std::invalid_argument("wrong number of values");
  auto data = tensor_.dense() ? std::vector<char>(size()) : host();
  visit(tensor_.dtype, [&](auto tag) {
    using T = decltype(tag);
    const size_t cols = static_cast<size_t>(tensor_.cols()), stride = static_cast<size_t>(tensor_.row_stride);
    for (size_t i = 0; i < values.size(); ++i) {
      const T value = from_double<T>(values[i]);
      std::memcpy(&data[(i / cols * stride + i % cols) * sizeof(T)], &value, sizeof(T));
    }
  });
  upload(data);
}

void TensorBuffer::set(size_t index, double value) {
  visit(tensor_.dtype, [&](auto tag) {
    using T = decltype(tag);
    const size_t cols = static_cast<size_t>(tensor_.cols()), stride = static_cast<size_t>(tensor_.row_stride);
    const T element = from_double<T>(value);
    kernels::copy_bytes(static_cast<T*>(tensor_.data) + index / cols * stride + index % cols, tensor_.device,
                        &element, {}, sizeof(T));
  });
}

std::vector<double> TensorBuffer::values() const {
  const auto data = host();
  std::vector<double> values(static_cast<size_t>(tensor_.numel()));
  visit(tensor_.dtype, [&](auto tag) {
    using T = decltype(tag);
    const size_t cols = static_cast<size_t>(tensor_.cols()), stride = static_cast<size_t>(tensor_.row_stride);
    for (size_t i = 0; i < values.size(); ++i) {
      T value;
      std::memcpy(&value, &data[(i / cols * stride + i % cols) * sizeof(T)], sizeof(T));
      values[i] = static_cast<double>(value);
    }
  });
  return values;
}

void TensorBuffer::fill_normal(uint64_t seed, double scale, double offset) {
  set(normal_values(static_cast<size_t>(tensor_.numel()), seed, scale, offset));
}

bool TensorBuffer::padding_intact() const {
  const auto data = host();
  const size_t cols = static_cast<size_t>(tensor_.cols()), stride = static_cast<size_t>(tensor_.row_stride);
  bool intact = true;
  visit(tensor_.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T value = poison_value<T>();
    for (size_t i = 0; i < data.size() / sizeof(T); ++i)
      if (i % stride >= cols) intact &= std::memcmp(&data[i * sizeof(T)], &value, sizeof(T)) == 0;
  });
  return intact;
}

TensorBuffer buffer_of(DType dtype, kernels::Shape shape, const std::vector<double>& values,
                       kernels::Device device, int64_t padding) {
  TensorBuffer buffer(dtype, shape, device, padding);
  buffer.set(values);
  return buffer;
}

std::vector<double> normal_values(size_t count, uint64_t seed, double scale, double offset) {
  std::vector<double> values(count);
  for (size_t i = 0; i < count; ++i)
    values[i] = offset + scale * static_cast<double>(kernels::normal(seed, kernels::Purpose::test, i));
  return values;
}

TensorBuffer converted(const TensorBuffer& from, DType dtype) {
  TensorBuffer to(dtype, from.tensor().shape, from.tensor().device);
  to.set(from.values());
  return to;
}

void copy(const Tensor& from, const Tensor& to) {
  if (from.dtype != to.dtype || from.shape != to.shape || !from.dense() || !to.dense())
    throw std::invalid_argument("copy needs dense tensors of one type and shape");
  kernels::copy_bytes(to.data, to.device, from.data, from.device, from.bytes());
}

}  // namespace support

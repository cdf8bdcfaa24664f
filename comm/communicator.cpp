#include "comm/communicator.h"

#include <fmt/format.h>

#include "comm/checks.h"
#include "comm/nccl.h"

namespace comm {

using kernels::DType;
using kernels::ShapeError;

std::string Communicator::broadcast(const std::string& text, int root) {
  int64_t length = static_cast<int64_t>(text.size());
  broadcast(Tensor(&length, DType::i64, {1}), root);
  std::string result = rank() == root ? text : std::string(static_cast<size_t>(length), '\0');
  if (length > 0) broadcast(Tensor(result.data(), DType::u8, {length}), root);
  return result;
}

double Communicator::all_reduce(double value, Reduce op) {
  all_reduce(Tensor(&value, DType::f64, {1}), op);
  return value;
}

int64_t Communicator::all_reduce(int64_t value, Reduce op) {
  all_reduce(Tensor(&value, DType::i64, {1}), op);
  return value;
}

void check_dense(const char* operation, const Tensor& t) {
  if (!t.dense()) throw ShapeError(fmt::format("{}: the tensor {} is not dense", operation, to_string(t)));
}

void check_host_dense(const char* operation, const Tensor& t) {
  check_dense(operation, t);
  if (t.device.is_cuda())
    throw ShapeError(
        fmt::format("{}: the tensor is on a GPU; this communicator moves host memory", operation));
}

void check_reducible(const char* operation, const Tensor& t) {
  check_dense(operation, t);
  if (t.dtype != DType::f32 && t.dtype != DType::f64 && t.dtype != DType::i32 && t.dtype != DType::i64)
    throw ShapeError(
        fmt::format("{}: {} cannot be reduced; use fp32, fp64, int32 or int64", operation, to_string(t)));
}

void check_root(const char* operation, int root, int size) {
  if (root < 0 || root >= size)
    throw ShapeError(fmt::format("{}: root {} is not one of {} ranks", operation, root, size));
}

void check_stripes(const char* operation, const Tensor& t, int size) {
  check_dense(operation, t);
  if (t.shape.rank() != 3 || t.dim(1) != size)
    throw ShapeError(
        fmt::format("{}: {} is not cut into stripes of {} parts", operation, to_string(t), size));
}

std::unique_ptr<Communicator> make_gpu_communicator(Communicator& world, kernels::Device device,
                                                    kernels::Stream compute, std::chrono::seconds deadline) {
  if (!device.is_cuda()) return nullptr;
  if (world.size() == 1) return make_local_communicator();
  if constexpr (kernels::kCudaEnabled) return make_nccl_communicator(world, device, compute, deadline);
  throw kernels::ConfigError("this build has no CUDA; build with nvcc on the PATH or use train.device = cpu");
}

}  // namespace comm

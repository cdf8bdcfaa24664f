#include "kernels/cuda/device.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "kernels/core/error.h"

namespace kernels::cuda {

namespace {
void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw DeviceError(fmt::format("{}: {}", what, cudaGetErrorString(status)));
}
}  // namespace

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::string device_name(int index) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), "reading a GPU's properties");
  return properties.name;
}

void* allocate_bytes(int index, size_t bytes) {
  void* data = nullptr;
  check(cudaSetDevice(index), "choosing a GPU");
  check(cudaMalloc(&data, bytes), "allocating GPU memory");
  return data;
}

void free_bytes(int index, void* data) noexcept {
  cudaSetDevice(index);
  cudaFree(data);
}

void copy_bytes(void* dst, const void* src, size_t bytes) {
  check(cudaMemcpy(dst, src, bytes, cudaMemcpyDefault), "copying GPU memory");
}

}  // namespace kernels::cuda

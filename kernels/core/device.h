#pragma once
// Where a tensor lives. A build without CUDA knows the same types; kCudaEnabled is a choice of the build.
#include <cstddef>
#include <string>

#include "kernels/core/build_config.h"

namespace kernels {

struct Device {
  enum class Kind : unsigned char { cpu, cuda };
  Kind kind = Kind::cpu;
  int index = 0;
  bool is_cuda() const { return kind == Kind::cuda; }
  bool operator==(const Device&) const = default;
};

// An in-order queue of device work; null on the CPU, where an operation has finished when its call returns.
struct Stream {
  void* handle = nullptr;
};

// Number of usable CUDA devices; 0 in a build without CUDA or on a machine without a driver. Never throws.
int cuda_device_count();
// Why no CUDA device can be used here, and what to do about it; empty where one can.
std::string cuda_problem();
// "cpu: <model name>, N threads" or "cuda:0: NVIDIA H200".
std::string describe(Device device);

struct DeviceMemory {
  size_t free = 0, total = 0;
};
// Of a GPU, or of this machine's main memory.
DeviceMemory memory_of(Device device);
// 64-byte aligned (CPU) or device memory; DeviceError when there is not enough.
void* allocate_bytes(Device device, size_t bytes);
void free_bytes(Device device, void* data) noexcept;
// Copies between any two devices and waits until it is done. For set-up, checkpoints and metrics, never
// inside a step.
void copy_bytes(void* dst, Device dst_device, const void* src, Device src_device, size_t bytes);

}  // namespace kernels

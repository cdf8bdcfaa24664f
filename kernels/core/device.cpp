#include "kernels/core/device.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>

#include "kernels/core/error.h"
#include "kernels/core/parallel.h"
#include "kernels/cuda/device.h"

namespace kernels {

int cuda_device_count() {
  if constexpr (kCudaEnabled) return cuda::device_count();
  return 0;
}

std::string cuda_problem() {
  if constexpr (kCudaEnabled) return cuda::problem();
  return "this build has no CUDA; build with nvcc on the PATH";
}

DeviceMemory memory_of(Device device) {
  if constexpr (kCudaEnabled)
    if (device.is_cuda()) {
      DeviceMemory memory;
      cuda::read_memory(device.index, memory.free, memory.total);
      return memory;
    }
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return {static_cast<size_t>(sysconf(_SC_AVPHYS_PAGES)) * page,
          static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * page};
}

std::string describe(Device device) {
  if constexpr (kCudaEnabled)
    if (device.is_cuda()) return fmt::format("cuda:{}: {}", device.index, cuda::device_name(device.index));
  std::ifstream info("/proc/cpuinfo");
  std::string line, model = "CPU";
  while (std::getline(info, line))
    if (line.starts_with("model name")) {
      model = line.substr(line.find(':') + 2);
      break;
    }
  return fmt::format("cpu: {}, {} thread{}", model, threads(), threads() == 1 ? "" : "s");
}

void* allocate_bytes(Device device, size_t bytes) {
  if constexpr (kCudaEnabled)
    if (device.is_cuda()) return cuda::allocate_bytes(device.index, bytes);
  // Huge pages where there are any: decoding streams weights, and a TLB miss every 4 KiB costs a tenth of the
  // bandwidth.
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* data = std::aligned_alloc(alignment, rounded);
  if (!data)
    throw DeviceError(
        fmt::format("not enough memory for {} MiB; use a smaller model or micro_batch", bytes >> 20));
  if (bytes >= kHugePage) madvise(data, rounded, MADV_HUGEPAGE);
  return data;
}

void free_bytes(Device device, void* data) noexcept {
  if constexpr (kCudaEnabled)
    if (device.is_cuda()) return cuda::free_bytes(device.index, data);
  std::free(data);
}

void copy_bytes(void* dst, Device dst_device, const void* src, Device src_device, size_t bytes) {
  if constexpr (kCudaEnabled)
    if (dst_device.is_cuda() || src_device.is_cuda()) return cuda::copy_bytes(dst, src, bytes);
  if (bytes > 0) std::memcpy(dst, src, bytes);
}

}  // namespace kernels

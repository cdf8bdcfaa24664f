#pragma once
// CUDA devices, without CUDA's headers. Defined only in builds with CUDA; callers stand behind kCudaEnabled.
#include <cstddef>
#include <string>

namespace kernels::cuda {

int device_count();
std::string device_name(int index);
void* allocate_bytes(int index, size_t bytes);
void free_bytes(int index, void* data) noexcept;
void copy_bytes(void* dst, const void* src, size_t bytes);

}  // namespace kernels::cuda

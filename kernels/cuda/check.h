#pragma once
// CUDA's status codes become exceptions here.
#include <cuda_runtime_api.h>

#include "kernels/core/context.h"

namespace kernels::cuda {

// DeviceError "<what>: <CUDA's message>" unless status is success.
void check(cudaError_t status, const char* what);
// After a kernel launch: the launch's own error.
inline void check_launch(const char* operation) { check(cudaGetLastError(), operation); }

inline cudaStream_t stream_of(const Context& ctx) { return static_cast<cudaStream_t>(ctx.stream.handle); }

// Of the current device.
int device_attribute(cudaDeviceAttr which);
// Streaming multiprocessors of the current device.
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
// Bytes of shared memory that a block can ask for there.
inline int shared_memory_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
// ShapeError where attention's blocks for heads of `width` elements need more than that.
void check_shared_memory(const char* operation, int64_t width, size_t bytes);
// And what each block takes of a multiprocessor's besides, which is as much larger.
inline constexpr int kReservedShared = 1024;

}  // namespace kernels::cuda

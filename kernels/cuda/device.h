#pragma once
// CUDA devices, without CUDA's headers. Defined only in builds with CUDA; callers stand behind kCudaEnabled.
// core/device.h and core/stream.h say what each does. Handles are cudaStream_t, cudaEvent_t, cudaGraphExec_t.
#include <cstddef>
#include <string>

namespace kernels::cuda {

int device_count();
std::string problem();
void read_memory(int index, size_t& free, size_t& total);
std::string device_name(int index);
void use_device(int index);
void* allocate_bytes(int index, size_t bytes);
void free_bytes(int index, void* data) noexcept;
void* allocate_pinned(size_t bytes);
void free_pinned(void* data) noexcept;
void copy_bytes(void* dst, const void* src, size_t bytes);
void copy_async(void* dst, const void* src, size_t bytes, void* stream);

void* create_stream(int index, bool urgent);
void destroy_stream(void* stream) noexcept;
void synchronize_stream(void* stream);

void* create_event(int index, bool timing);
void destroy_event(void* event) noexcept;
void record_event(void* event, void* stream);
void wait_event(void* stream, void* event);
bool event_done(void* event);
void synchronize_event(void* event);
float milliseconds_between(void* start, void* end);

void begin_capture(void* stream);
void* end_capture(void* stream);
void launch_graph(void* graph, void* stream);
void destroy_graph(void* graph) noexcept;

}  // namespace kernels::cuda

#include "kernels/cuda/device.h"

#include <fmt/format.h>

#include "kernels/core/error.h"
#include "kernels/core/stream.h"
#include "kernels/cuda/check.h"

namespace kernels::cuda {

namespace {
cudaStream_t as_stream(void* handle) { return static_cast<cudaStream_t>(handle); }
cudaEvent_t as_event(void* handle) { return static_cast<cudaEvent_t>(handle); }
void count_synchronization() { ++device_counters().synchronizations; }
}  // namespace

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw DeviceError(fmt::format("{}: {}", what, cudaGetErrorString(status)));
}

int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "reading the current GPU");
  check(cudaDeviceGetAttribute(&value, which, device), "reading a GPU's properties");
  return value;
}

void check_shared_memory(const char* operation, int64_t width, size_t bytes) {
  const auto limit = static_cast<size_t>(shared_memory_limit());
  if (bytes > limit)
    throw ShapeError(fmt::format(
        "{}: heads of {} elements need {} KiB of shared memory in a block, and this GPU has {}; use "
        "more heads that are smaller (model.heads)",
        operation, width, (bytes + 1023) / 1024, limit / 1024));
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::string problem() {
  constexpr int kOldest = 8;  // compute capability that the kernels are compiled for
  int count = 0, driver = 0, runtime = 0, major = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return "no NVIDIA driver is installed";
  if (status == cudaErrorInsufficientDriver)
    return fmt::format("its driver is for CUDA {}.{} and this build needs {}.{}; update the NVIDIA driver",
                       driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0))
    return "no GPU is visible; look at nvidia-smi and CUDA_VISIBLE_DEVICES";
  if (status != cudaSuccess) return cudaGetErrorString(status);
  for (int i = 0; i < count; ++i) {
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i), "reading a GPU's properties");
    if (major < kOldest)
      return fmt::format("cuda:{} is a {} of compute capability {}, at least {}.0 is needed", i,
                         device_name(i), major, kOldest);
  }
  return {};
}

void read_memory(int index, size_t& free, size_t& total) {
  use_device(index);
  check(cudaMemGetInfo(&free, &total), "reading a GPU's memory");
}

std::string device_name(int index) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), "reading a GPU's properties");
  return properties.name;
}

void use_device(int index) { check(cudaSetDevice(index), "choosing a GPU"); }

void* allocate_bytes(int index, size_t bytes) {
  use_device(index);
  ++device_counters().allocations;
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // the error is handled here; later calls must not find it
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    throw DeviceError(
        fmt::format("cuda:{} has {} MiB free, {} MiB are needed; use a smaller train.micro_batch or model, "
                    "or end what else runs on this GPU",
                    index, free >> 20, bytes >> 20));
  }
  check(status, "allocating GPU memory");
  return data;
}

void free_bytes(int index, void* data) noexcept {
  cudaSetDevice(index);
  cudaFree(data);
}

void* allocate_pinned(size_t bytes) {
  void* data = nullptr;
  check(cudaMallocHost(&data, bytes), "allocating page-locked memory");
  return data;
}

void free_pinned(void* data) noexcept { cudaFreeHost(data); }

void copy_bytes(void* dst, const void* src, size_t bytes) {
  count_synchronization();
  // Streams here do not wait for the default stream, so what they still have to do comes first.
  check(cudaDeviceSynchronize(), "waiting for the GPU");
  check(cudaMemcpy(dst, src, bytes, cudaMemcpyDefault), "copying GPU memory");
  // It may return while the GPU still writes: what comes from memory that is not page-locked has only left it
  // then, and copies within a GPU have only begun.
  check(cudaStreamSynchronize(nullptr), "copying GPU memory");
}

void copy_async(void* dst, const void* src, size_t bytes, void* stream) {
  check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, as_stream(stream)), "copying GPU memory");
}

void* create_stream(int index, bool urgent) {
  use_device(index);
  cudaStream_t stream = nullptr;
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "creating a stream");
  check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, urgent ? greatest : least),
        "creating a stream");
  return stream;
}

void destroy_stream(void* stream) noexcept { cudaStreamDestroy(as_stream(stream)); }

void synchronize_stream(void* stream) {
  count_synchronization();
  check(cudaStreamSynchronize(as_stream(stream)), "waiting for the GPU");
}

void* create_event(int index, bool timing) {
  use_device(index);
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, timing ? cudaEventDefault : cudaEventDisableTiming),
        "creating an event");
  return event;
}

void destroy_event(void* event) noexcept { cudaEventDestroy(as_event(event)); }

void record_event(void* event, void* stream) {
  check(cudaEventRecord(as_event(event), as_stream(stream)), "recording an event");
}

void wait_event(void* stream, void* event) {
  check(cudaStreamWaitEvent(as_stream(stream), as_event(event), 0), "waiting for an event");
}

bool event_done(void* event) {
  const cudaError_t status = cudaEventQuery(as_event(event));
  if (status == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  check(status, "running on the GPU");
  return true;
}

void synchronize_event(void* event) {
  count_synchronization();
  check(cudaEventSynchronize(as_event(event)), "running on the GPU");
}

float milliseconds_between(void* start, void* end) {
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, as_event(start), as_event(end)), "reading a GPU time");
  return milliseconds;
}

void begin_capture(void* stream) {
  check(cudaStreamBeginCapture(as_stream(stream), cudaStreamCaptureModeThreadLocal),
        "recording a CUDA graph");
}

void* end_capture(void* stream) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(as_stream(stream), &graph), "recording a CUDA graph");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "making a CUDA graph");
  return executable;
}

void launch_graph(void* graph, void* stream) {
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), as_stream(stream)), "launching a CUDA graph");
}

void destroy_graph(void* graph) noexcept { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)); }

}  // namespace kernels::cuda

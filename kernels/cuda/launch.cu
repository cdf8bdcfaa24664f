#include "kernels/cuda/check.h"
#include "kernels/cuda/launch.h"

namespace kernels::cuda {

namespace {
__global__ void probe() {}
}  // namespace

// Code for older architectures, translated for a newer GPU, has neither.
bool has_clusters() {
  static const bool compiled = [] {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, probe), "reading a kernel's properties");
    return attributes.ptxVersion >= 90;
  }();
  return compiled && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
}

}  // namespace kernels::cuda

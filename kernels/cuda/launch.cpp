#include "kernels/cuda/launch.h"

#include "kernels/cuda/check.h"

namespace kernels::cuda {

bool has_clusters() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "reading the current GPU");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "reading a GPU's properties");
  return major >= 9;
}

}  // namespace kernels::cuda

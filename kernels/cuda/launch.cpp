#include "kernels/cuda/launch.h"

#include "kernels/cuda/check.h"

namespace kernels::cuda {

bool has_clusters() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

}  // namespace kernels::cuda

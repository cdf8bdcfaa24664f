#pragma once
// Kernel launches that need more than <<<>>>: clusters of blocks, and starting before the previous kernel has
// ended (kernels/cuda/device/cluster.cuh).
#include <cuda_runtime.h>

#include <utility>

#include "kernels/cuda/check.h"

namespace kernels::cuda {

struct LaunchShape {
  dim3 grid, block;
  unsigned cluster = 1;    // blocks along grid.x; 1 where has_clusters() is false
  bool dependent = false;  // the kernel calls wait_for_previous()
  unsigned shared = 0;     // bytes of dynamic shared memory
};

// Whether a kernel of so many blocks should start before the one ahead of it has ended: one that fills the
// GPU has nothing to gain by that.
inline bool starts_early(unsigned blocks) { return blocks <= 256; }

// Whether the current device has clusters and dependent launches, and so has what was compiled for it.
bool has_clusters();

template <typename... Parameters, typename... Arguments>
void launch(const Context& ctx, const char* operation, const LaunchShape& shape,
            void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaLaunchAttribute attributes[4];
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {shape.cluster, 1, 1};
    // Blocks of a cluster work on the same at the same time: two on one multiprocessor would be the last.
    attributes[count].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
    attributes[count++].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicySpread;
  }
  if (shape.dependent && has_clusters()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    // A multiprocessor divides its memory between level 1 and blocks anew only when it is empty: blocks of
    // two kernels stand beside each other where both ask for the same.
    attributes[count].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attributes[count++].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.stream = stream_of(ctx);
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), operation);
}

}  // namespace kernels::cuda

#pragma once
// Blocks that share one another's shared memory (clusters), and kernels that start before the one ahead of
// them in the stream has ended. Both exist from sm_90 on; below that a cluster is one block and a kernel
// starts when the last has ended.
#include <cstdint>

namespace kernels::cuda {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

// Every thread of every block of the cluster; orders shared memory as __syncthreads() does within a block.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#else
  __syncthreads();
#endif
}

// The same for shared memory alone, which does not wait for global memory. What was read of other blocks has
// to have been used.
__device__ __forceinline__ void cluster_arrive_shared() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "fence.release.sync_restrict::shared::cta.cluster;\n\tbarrier.cluster.arrive.relaxed.aligned;" ::
          : "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
__device__ __forceinline__ void cluster_sync_shared() {
  cluster_arrive_shared();
  cluster_wait();
}

// No thread leaves before every thread of the cluster is here. What was read has to have been used.
__device__ __forceinline__ void cluster_leave() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// The address of another block's copy of one of this block's shared variables.
template <typename T>
__device__ __forceinline__ const T* cluster_shared(const T* mine, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
  return reinterpret_cast<const T*>(theirs);
#else
  return mine;
#endif
}

// The same for an address within shared memory, and two numbers from there.
__device__ __forceinline__ uint32_t cluster_address(uint32_t mine, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t theirs;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(mine), "r"(rank));
  return theirs;
#else
  return mine;
#endif
}
__device__ __forceinline__ float2 load_cluster(uint32_t from) {
  float2 x;
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from) : "memory");
#else
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from) : "memory");
#endif
  return x;
}

// Until a barrier in shared memory has completed a phase, counted from 0. With kCluster other blocks take
// part in it, and what they stored before is still to be acquired.
template <bool kCluster>
__device__ __forceinline__ void wait_for_phase(uint32_t barrier, int phase) {
#if __CUDA_ARCH__ >= 900
  uint32_t there = 0;
  while (!there)
    if constexpr (kCluster)
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(there)
          : "r"(barrier), "r"(phase & 1)
          : "memory");
    else
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(there)
          : "r"(barrier), "r"(phase & 1)
          : "memory");
#endif
}

// Until everything ahead in the stream has ended and its results can be read. A block of a kernel launched as
// `dependent` calls this before it touches anything that another kernel of the stream reads or writes.
// Parameters may be read before, as kernels that write them are not followed early; and what an operation's
// header says. Only a block that writes nothing may end without it.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the kernel behind this one start once every block has called this. It may be called first of all: the
// next kernel waits until this one has ended, which has waited itself.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace kernels::cuda

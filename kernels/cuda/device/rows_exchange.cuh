#pragma once
// How the blocks of a cluster put the sums of a row-invariant product together (kernels/cuda/linear_rows.cu):
// every block sends what it has of an output to the block that writes it.
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/mma.cuh"

namespace kernels::cuda {

// A block's sums are cut into lines, one for the lanes of a warp. Line l is written by block l % blocks,
// which gets it from all of them and whose own line number l / blocks it is.
struct LineShare {
  int blocks, rank;
  unsigned inverse;  // 65536 / blocks, rounded up: there are few lines
  // The line of a block's own one; there may be none.
  __device__ __forceinline__ int line(int own) const { return rank + own * blocks; }
  __device__ __forceinline__ int own_of(int line) const {
    return static_cast<int>(static_cast<unsigned>(line) * inverse >> 16);
  }
  __device__ __forceinline__ int lines_of_block(int lines) const { return own_of(lines - rank + blocks - 1); }
};

// kLines: of a block's sums; kBlocks: the most of a cluster.
template <int kLines, int kBlocks>
struct Exchange {
  float sums[(kLines + kBlocks - 1) * 32];  // of this block's own lines, each from all blocks
  alignas(8) uint64_t arrived;

  // All threads, once; afterwards every block may send.
  __device__ __forceinline__ void start(LineShare share) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&arrived)) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      expect(share);
    }
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
#endif
  }
  // One thread, for each round of sums, when all have waited for the one before. Sums that come earlier
  // count.
  __device__ __forceinline__ void expect(LineShare share) {
#if __CUDA_ARCH__ >= 900
    const int bytes = share.lines_of_block(kLines) * 128 * share.blocks;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&arrived)),
                 "r"(bytes)
                 : "memory");
#endif
  }
  // A lane's way to the block that writes a line.
  struct Way {
    uint32_t to, barrier;
  };
  __device__ __forceinline__ Way way(LineShare share, int line) const {
    Way w{};
#if __CUDA_ARCH__ >= 900
    const int own = share.own_of(line), owner = line - own * share.blocks;
    const float* place = sums + (own * share.blocks + share.rank) * 32 + threadIdx.x % 32;
    // Here, and not where it is used.
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(w.to)
                 : "r"(shared_address(place)), "r"(owner));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(w.barrier)
                 : "r"(shared_address(&arrived)), "r"(owner));
#endif
    return w;
  }
  static __device__ __forceinline__ void send(Way w, float sum) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(w.to),
                 "r"(__float_as_uint(sum)), "r"(w.barrier)
                 : "memory");
#endif
  }
  // Until all sums of a round, counted from 0, are there.
  __device__ __forceinline__ void wait(int round) const {
#if __CUDA_ARCH__ >= 900
    wait_for_phase<true>(shared_address(&arrived), round);
    // Of other blocks' stores to shared memory; global memory is another matter, and would cost more.
    asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
#endif
  }
  // This lane's sum of an own line: the blocks' in order.
  __device__ __forceinline__ float sum(LineShare share, int own) const {
    const float* place = sums + own * share.blocks * 32 + threadIdx.x % 32;
    float of[kBlocks], sum = 0;
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) of[r] = r < share.blocks ? place[r * 32] : 0.0f;
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) sum += of[r];
    return sum;
  }
};

}  // namespace kernels::cuda

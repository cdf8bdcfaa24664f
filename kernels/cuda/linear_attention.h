#pragma once
// Between linear attention's files: how its sweeps are cut up and launched.
#include <cuda_runtime_api.h>

#include <type_traits>

#include "kernels/cuda/device/linear_sweep.cuh"
#include "kernels/ops/linear_attention.h"

namespace kernels::cuda {

// An H200's; a constant, so that results do not depend on the GPU.
inline constexpr int64_t kMultiprocessors = 132;

// How N rows in S sequences are cut into segments, from sizes alone. state_floats: working memory per key
// head.
struct SweepPlan {
  int64_t segment_rows = 0;
  int64_t slots = 0;   // of segments
  int64_t states = 0;  // slots of states; 0 when no sequence can have two segments
  int64_t state_floats = 0;
};

// tasks: blocks that work on one segment; blocks: how many of them fill the GPU.
SweepPlan plan_segments(int64_t rows, int64_t sequences, int64_t tasks, int64_t blocks);

// Calls fn(integral_constant) for a sweep.
template <class Fn>
void visit_sweep(Sweep sweep, Fn&& fn) {
  switch (sweep) {
    case Sweep::forward:
      return fn(std::integral_constant<Sweep, Sweep::forward>());
    case Sweep::dq:
      return fn(std::integral_constant<Sweep, Sweep::dq>());
    case Sweep::dk:
      return fn(std::integral_constant<Sweep, Sweep::dk>());
    case Sweep::dv:
      return fn(std::integral_constant<Sweep, Sweep::dv>());
  }
}

// Any type and width, fp32 arithmetic. output: the type of o and do.
SweepPlan any_sweep_plan(int64_t rows, int64_t sequences, int64_t heads, int64_t width);
void any_sweep(Sweep sweep, DType compute, DType output, const SweepPlan& plan, const SweepTask& task,
               cudaStream_t stream);

// On the matrix units: fp16 and bf16, widths 64 and 128, rows of 16-byte units. factors (H, N) and sweep.dout
// (g, of the compute type) as device/linear_tiles.cuh has them; dq goes to sweep.out.
// Whether the current GPU's multiprocessors have the shared memory.
bool tile_memory_fits(int64_t width);
SweepPlan tile_sweep_plan(int64_t rows, int64_t sequences, int64_t heads, int64_t width);
void tile_forward(DType compute, DType output, const SweepPlan& plan, const SweepTask& sweep,
                  cudaStream_t stream);
void tile_backward(DType compute, const SweepPlan& plan, const SweepTask& sweep, const float4* factors,
                   Rows dk, Rows dv, cudaStream_t stream);

}  // namespace kernels::cuda

// Linear attention's sweeps on the matrix units: fp16 and bf16, head sizes 64 and 128.
#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/cuda/device/linear_tiles.cuh"
#include "kernels/cuda/linear_attention.h"

namespace kernels::cuda {

namespace {

// Two blocks on a multiprocessor: 255 registers a thread, 110 KB of shared memory a block. Three at half the
// head size.
template <int kD>
inline constexpr int kBlocksPerMultiprocessor = kD == 128 ? 2 : 3;

// Dynamic shared memory is only promised to begin at a multiple of 16 bytes.
template <int kD>
__device__ TileShared<kD>& align(char* memory) {
  constexpr uint32_t kAlignment = alignof(TileShared<kD>);
  return *reinterpret_cast<TileShared<kD>*>(memory + (0 - shared_address(memory)) % kAlignment);
}
template <int kD>
inline constexpr int kSharedBytes = sizeof(TileShared<kD>) + alignof(TileShared<kD>);

template <Sweep kSweep, class T, int kD, class Out, bool kGrouped, bool kStateOnly>
__device__ void sweep_block(const TileTask& task, int block) {
  extern __shared__ char memory[];
  constexpr bool kUp = ascending(kSweep);
  const SweepTask& t = task.sweep;
  const int heads = kUp && !kStateOnly ? t.heads : t.key_heads, head = block % heads;
  const Segment segment = find_segment<kStateOnly, kUp>(t, block / heads);
  if (segment.first == segment.last) return;
  const int key_head = kUp && !kStateOnly ? head / (t.heads / t.key_heads) : head;
  TileSweep<kSweep, T, kD, Out, kGrouped, kStateOnly>(task, align<kD>(memory), segment, head, key_head)
      .run(segment);
}

template <Sweep kSweep, class T, int kD, class Out, bool kGrouped, bool kStateOnly>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerMultiprocessor<kD>)
    tile_sweep(const __grid_constant__ TileTask task) {
  sweep_block<kSweep, T, kD, Out, kGrouped, kStateOnly>(task, static_cast<int>(blockIdx.x));
}

// dk and dv of the same rows by neighbouring blocks: they read the same q, k, v and do.
template <class T, int kD, bool kGrouped>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerMultiprocessor<kD>)
    key_sweeps(const __grid_constant__ TileTask task) {
  const int block = static_cast<int>(blockIdx.x / 2);
  if (blockIdx.x % 2 == 0) {
    sweep_block<Sweep::dk, T, kD, T, kGrouped, false>(task, block);
  } else {
    sweep_block<Sweep::dv, T, kD, T, kGrouped, false>(task, block);
  }
}

template <int kD, class Kernel>
void launch(Kernel* kernel, int64_t grid, const TileTask& task, cudaStream_t stream) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<kD>),
        "linear_attention");
  kernel<<<static_cast<unsigned>(grid), kTileThreads, kSharedBytes<kD>, stream>>>(task);
  check_launch("linear_attention");
}

template <Sweep kSweep, class T, int kD>
void launch_states(const SweepPlan& plan, const TileTask& task, cudaStream_t stream) {
  if (plan.states == 0) return;
  const int64_t grid = plan.states * task.sweep.key_heads;
  if (ascending(kSweep) || task.sweep.heads == task.sweep.key_heads)
    launch<kD>(tile_sweep<kSweep, T, kD, T, false, true>, grid, task, stream);
  else
    launch<kD>(tile_sweep<kSweep, T, kD, T, true, true>, grid, task, stream);
}

// Calls fn(T, integral_constant width).
template <class Fn>
void visit(DType compute, int width, Fn&& fn) {
  const auto with_width = [&](auto t) {
    width == 64 ? fn(t, std::integral_constant<int, 64>()) : fn(t, std::integral_constant<int, 128>());
  };
  compute == DType::f16 ? with_width(__half{}) : with_width(__nv_bfloat16{});
}

}  // namespace

bool tile_memory_fits(int64_t width) {
  return shared_memory_limit() >= (width == 128 ? kSharedBytes<128> : kSharedBytes<64>);
}

SweepPlan tile_sweep_plan(int64_t rows, int64_t sequences, int64_t heads, int64_t width) {
  SweepPlan plan = plan_segments(
      rows, sequences, heads,
      (width == 128 ? kBlocksPerMultiprocessor<128> : kBlocksPerMultiprocessor<64>)*kMultiprocessors);
  plan.state_floats = width * width + width;
  return plan;
}

void tile_forward(DType compute, DType output, const SweepPlan& plan, const SweepTask& sweep,
                  cudaStream_t stream) {
  const TileTask task{.sweep = sweep, .dv = {}, .factors = nullptr};
  visit(compute, sweep.width, [&](auto t, auto width) {
    using T = decltype(t);
    constexpr int kD = decltype(width)::value;
    launch_states<Sweep::dq, T, kD>(plan, task, stream);
    const int64_t grid = plan.slots * sweep.heads;
    if (output == DType::f32)
      launch<kD>(tile_sweep<Sweep::forward, T, kD, float, false, false>, grid, task, stream);
    else
      launch<kD>(tile_sweep<Sweep::forward, T, kD, T, false, false>, grid, task, stream);
  });
}

void tile_backward(DType compute, const SweepPlan& plan, const SweepTask& sweep, const float4* factors,
                   Rows dk, Rows dv, cudaStream_t stream) {
  TileTask task{.sweep = sweep, .dv = dv, .factors = factors};
  visit(compute, sweep.width, [&](auto t, auto width) {
    using T = decltype(t);
    constexpr int kD = decltype(width)::value;
    launch_states<Sweep::dq, T, kD>(plan, task, stream);
    launch<kD>(tile_sweep<Sweep::dq, T, kD, T, false, false>, plan.slots * sweep.heads, task, stream);
    task.sweep.out = dk;
    launch_states<Sweep::dk, T, kD>(plan, task, stream);
    const int64_t grid = 2 * plan.slots * sweep.key_heads;
    if (sweep.heads == sweep.key_heads)
      launch<kD>(key_sweeps<T, kD, false>, grid, task, stream);
    else
      launch<kD>(key_sweeps<T, kD, true>, grid, task, stream);
  });
}

}  // namespace kernels::cuda

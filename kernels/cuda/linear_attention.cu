// Training linear attention: the choice of the sweeps, and what comes before and beside them.
#include <algorithm>
#include <bit>

#include "kernels/cuda/check.h"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/linear_attention.h"

namespace kernels::cuda {

namespace {

constexpr int kThreads = 256;

struct Cleared {
  void* data[3];
  int64_t stride[3];  // bytes
  int bytes[3];       // of a row, a multiple of 2
};

// Zeroes the rows that belong to no sequence; blockIdx.y: the tensor.
__global__ void clear_outside(const int32_t* cu_seqlens, int sequences, int rows,
                              const __grid_constant__ Cleared x) {
  const int first = cu_seqlens[0], inside = cu_seqlens[sequences] - first;
  for (int i = blockIdx.x; i < rows - inside; i += gridDim.x) {
    const int64_t row = i < first ? i : i + inside;
    auto* at =
        reinterpret_cast<uint16_t*>(static_cast<char*>(x.data[blockIdx.y]) + row * x.stride[blockIdx.y]);
    for (int j = threadIdx.x; j < x.bytes[blockIdx.y] / 2; j += blockDim.x) at[j] = 0;
  }
}

void clear(const SweepTask& task, std::initializer_list<Tensor> tensors, cudaStream_t stream) {
  Cleared cleared = {};
  unsigned count = 0;
  for (const Tensor& x : tensors) {
    if (!x) continue;
    const auto size = static_cast<int64_t>(size_of(x.dtype));
    cleared.data[count] = x.data;
    cleared.stride[count] = x.row_stride * size;
    cleared.bytes[count++] = static_cast<int>(x.cols() * size);
  }
  const dim3 grid(static_cast<unsigned>(std::min(task.rows, 64)), count);
  clear_outside<<<grid, kThreads, 0, stream>>>(task.cu_seqlens, task.sequences, task.rows, cleared);
  check_launch("linear_attention");
}

// dd = -(do . o) / denominator, a warp per row and head.
template <class T, class G>
__global__ void output_dots(SweepTask t, Rows o, float* dd) {
  const int64_t task = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (task >= int64_t{t.rows} * t.heads) return;
  const int64_t row = task / t.heads, head = task % t.heads;
  const G* dout = static_cast<const G*>(t.dout.data) + row * t.dout.stride + head * t.width;
  const T* out = static_cast<const T*>(o.data) + row * o.stride + head * t.width;
  float sum = 0;
  for (int d = threadIdx.x % 32; d < t.width; d += 32) sum = fmaf(to_float(dout[d]), to_float(out[d]), sum);
  sum = warp_reduce<Sum>(sum);
  if (threadIdx.x % 32 == 0) dd[task] = -sum / t.denominator[row * t.denominator_stride + head];
}

template <typename Op>
__device__ __forceinline__ float lanes_reduce(float x, int lanes, Op op = {}) {
#pragma unroll
  for (int offset = lanes / 2; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// What the sweeps on the matrix units need of each row of do (device/linear_tiles.cuh), eight elements of a
// row and head in a lane. do of the main type becomes g in the compute type, each row at a power of two of
// its own.
template <class T, class G, int kWidth>
__global__ void output_factors(SweepTask t, Rows o, T* g, float4* factors) {
  constexpr int kEach = 8, kLanes = kWidth / kEach;
  const int64_t task = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kLanes;
  const bool live = task < int64_t{t.rows} * t.heads;
  const int lane = threadIdx.x % kLanes;
  const int64_t row = live ? task / t.heads : 0, head = live ? task % t.heads : 0;
  const int64_t at = head * kWidth + lane * kEach;
  Vector<G> dout[kEach / kVectorElements<G>];
#pragma unroll
  for (int i = 0; i < kEach / kVectorElements<G>; ++i)
    dout[i] =
        load_vector(static_cast<const G*>(t.dout.data) + row * t.dout.stride + at + i * kVectorElements<G>);
  Vector<T, kEach> out{};
  if (t.denominator) out = load_vector<T, kEach>(static_cast<const T*>(o.data) + row * o.stride + at);
  float x[kEach], peak = 0, dot = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    x[i] = to_float(dout[i / kVectorElements<G>].at[i % kVectorElements<G>]);
    peak = fmaxf(peak, fabsf(x[i]));
  }
  peak = lanes_reduce<Max>(peak, kLanes);
  float unit = 1;
  if constexpr (!std::is_same_v<T, G>) {
    if (peak > 0) unit = power_of_two(min(max(exponent(peak), -40), 40));
    Vector<T, kEach> rounded;
#pragma unroll
    for (int i = 0; i < kEach; ++i) rounded.at[i] = from_float<T>(x[i] /= unit);
    if (live) store_vector(g + row * t.heads * kWidth + at, rounded);
  }
  float weight = unit;
  if (t.denominator) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) dot = fmaf(x[i], to_float(out.at[i]), dot);
    dot = lanes_reduce<Sum>(dot, kLanes);
    weight /= t.denominator[row * t.denominator_stride + head];
  }
  if (live && lane == 0) factors[head * t.rows + row] = {weight, -dot, peak / unit, unit};
}

Rows rows_of(const Tensor& x) { return {x.data, x.row_stride}; }
unsigned grid_of(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

SweepTask make_task(const LinearAttentionParams& params, const Tensor& q, const Tensor& k, const Tensor& v,
                    const Tensor& denominator, const Tensor& cu_seqlens, const SweepPlan& plan) {
  SweepTask task;
  task.q = rows_of(q), task.k = rows_of(k), task.v = rows_of(v);
  if (params.normalise) {
    task.denominator = denominator.as<float>();
    task.denominator_stride = denominator.row_stride;
  }
  task.cu_seqlens = cu_seqlens.as<int32_t>();
  task.sequences = static_cast<int>(cu_seqlens.rows() - 1);
  task.rows = static_cast<int>(q.rows());
  task.heads = static_cast<int>(q.dim(1));
  task.key_heads = static_cast<int>(k.dim(1));
  task.width = static_cast<int>(q.dim(2));
  task.segment_rows = static_cast<int>(plan.segment_rows);
  task.eps = params.eps;
  return task;
}

// Two ways to sweep, and memory for the states of either. Only addresses tell whether the matrix units can
// take rows, and a plan has none.
struct Ways {
  SweepPlan any, tiles;
  bool may_use_tiles;
  float* states;
};

Ways plan_ways(const Context& ctx, const Tensor& q, const Tensor& k, const Tensor& cu_seqlens) {
  const int64_t sequences = cu_seqlens.rows() - 1;
  Ways ways{any_sweep_plan(q.rows(), sequences, q.dim(1), q.dim(2)),
            tile_sweep_plan(q.rows(), sequences, q.dim(1), q.dim(2)),
            (q.dtype == DType::f16 || q.dtype == DType::bf16) && (q.dim(2) == 64 || q.dim(2) == 128),
            nullptr};
  int64_t floats = ways.any.states * ways.any.state_floats;
  if (ways.may_use_tiles) floats = std::max(floats, ways.tiles.states * ways.tiles.state_floats);
  if (floats > 0)
    ways.states = static_cast<float*>(
        ctx.scratch->allocate("linear attention states", DType::f32, {k.dim(1), floats}).data);
  return ways;
}

bool in_units(std::initializer_list<Tensor> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& x) {
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.row_stride % 8 == 0;
  });
}

// Calls fn(T, G) with the types of q and of do.
template <class Fn>
void visit_types(DType compute, DType gradient, Fn&& fn) {
  visit_device_dtype(compute, [&](auto t) { gradient == DType::f32 ? fn(t, float{}) : fn(t, t); });
}

void backward_in_tiles(const Tensor& q, const Tensor& dout, const Tensor& o, SweepTask task, const Ways& ways,
                       const Tensor& g, const Tensor& factors, Rows dk, Rows dv, cudaStream_t stream) {
  auto* to = static_cast<float4*>(factors.data);
  visit_types(q.dtype, dout.dtype, [&](auto t, auto gradient) {
    using T = decltype(t);
    using G = decltype(gradient);
    if constexpr (!std::is_same_v<T, float>) {
      auto* kernel = task.width == 64 ? output_factors<T, G, 64> : output_factors<T, G, 128>;
      kernel<<<grid_of(q.numel() / 8), kThreads, 0, stream>>>(task, rows_of(o), static_cast<T*>(g.data), to);
    }
  });
  check_launch("linear_attention_backward");
  if (g) task.dout = rows_of(g);
  tile_backward(q.dtype, ways.tiles, task, to, dk, dv, stream);
}

void backward_of_any(const Tensor& q, const Tensor& dout, const Tensor& o, SweepTask task, const Ways& ways,
                     const Tensor& dd, Rows dk, Rows dv, cudaStream_t stream) {
  if (task.denominator) {
    visit_types(q.dtype, dout.dtype, [&](auto t, auto gradient) {
      auto* kernel = output_dots<decltype(t), decltype(gradient)>;
      kernel<<<grid_of(q.rows() * q.dim(1) * 32), kThreads, 0, stream>>>(task, rows_of(o),
                                                                         static_cast<float*>(dd.data));
    });
    check_launch("linear_attention_backward");
    task.dd = static_cast<const float*>(dd.data);
  }
  for (auto [sweep, out] : {std::pair{Sweep::dq, task.out}, {Sweep::dk, dk}, {Sweep::dv, dv}}) {
    task.out = out;
    any_sweep(sweep, q.dtype, dout.dtype, ways.any, task, stream);
  }
}

}  // namespace

SweepPlan plan_segments(int64_t rows, int64_t sequences, int64_t tasks, int64_t blocks) {
  // Below kShortest rows a state costs more than it spares; powers of two cut the usual lengths evenly.
  constexpr uint64_t kShortest = 512;
  const auto even = static_cast<uint64_t>(rows * tasks / blocks);
  SweepPlan plan;
  plan.segment_rows = static_cast<int64_t>(std::bit_ceil(std::max(kShortest, even)));
  plan.states = rows / plan.segment_rows;
  plan.slots = plan.states + sequences;
  plan.state_floats = 1;
  return plan;
}

void linear_attention(const Context& ctx, const LinearAttentionParams& params, const Tensor& q,
                      const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, Tensor o,
                      Tensor denominator) {
  ArenaScope scope(*ctx.scratch);
  const Ways ways = plan_ways(ctx, q, k, cu_seqlens);
  if (ctx.rehearsal || q.numel() == 0) return;
  const bool tiles = ways.may_use_tiles && tile_memory_fits(q.dim(2)) && in_units({q, k, v, o});
  SweepTask task = make_task(params, q, k, v, denominator, cu_seqlens, tiles ? ways.tiles : ways.any);
  task.states = ways.states;
  task.out = rows_of(o);
  const cudaStream_t stream = stream_of(ctx);
  clear(task, {o, params.normalise ? denominator : Tensor()}, stream);
  if (tiles) {
    tile_forward(q.dtype, o.dtype, ways.tiles, task, stream);
  } else {
    any_sweep(Sweep::forward, q.dtype, o.dtype, ways.any, task, stream);
  }
}

void linear_attention_backward(const Context& ctx, const LinearAttentionParams& params, const Tensor& dout,
                               const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                               const Tensor& denominator, const Tensor& cu_seqlens, Tensor dq, Tensor dk,
                               Tensor dv) {
  ArenaScope scope(*ctx.scratch);
  const Ways ways = plan_ways(ctx, q, k, cu_seqlens);
  const int64_t row_heads = q.rows() * q.dim(1);
  const Tensor factors =
      ctx.scratch->allocate("linear attention rows", DType::f32, {row_heads, ways.may_use_tiles ? 4 : 1});
  const Tensor g = ways.may_use_tiles && dout.dtype != q.dtype
                       ? ctx.scratch->allocate("linear attention gradient", q.dtype, {q.rows(), q.cols()})
                       : Tensor();
  if (ctx.rehearsal || q.numel() == 0) return;
  const bool tiles = ways.may_use_tiles && tile_memory_fits(q.dim(2)) &&
                     in_units({q, k, v, dout, dq, dk, dv}) && (!params.normalise || in_units({o}));
  SweepTask task = make_task(params, q, k, v, denominator, cu_seqlens, tiles ? ways.tiles : ways.any);
  task.states = ways.states;
  task.dout = rows_of(dout);
  task.out = rows_of(dq);
  const cudaStream_t stream = stream_of(ctx);
  clear(task, {dq, dk, dv}, stream);
  const Rows k_out = rows_of(dk), v_out = rows_of(dv);
  if (tiles) {
    backward_in_tiles(q, dout, o, task, ways, g, factors, k_out, v_out, stream);
  } else {
    backward_of_any(q, dout, o, task, ways, factors, k_out, v_out, stream);
  }
}

}  // namespace kernels::cuda

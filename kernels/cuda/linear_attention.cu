// Training linear attention: what comes before and beside the sweeps.
#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/linear_attention.h"

namespace kernels::cuda {

namespace {

constexpr int kThreads = 256;

// Zeroes the rows that belong to no sequence.
template <class T>
__global__ void clear_outside(const int32_t* cu_seqlens, int sequences, int rows, Rows x, int cols) {
  const int first = cu_seqlens[0], last = cu_seqlens[sequences];
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    if (row >= first && row < last) continue;
    T* at = static_cast<T*>(x.data) + row * x.stride;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) at[c] = from_float<T>(0.0f);
  }
}

void clear(const SweepTask& task, const Tensor& x, cudaStream_t stream) {
  visit_device_dtype(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int blocks = static_cast<int>(std::min<int64_t>(x.rows(), 64));
    clear_outside<T><<<blocks, kThreads, 0, stream>>>(task.cu_seqlens, task.sequences, task.rows,
                                                      Rows{x.data, x.row_stride}, static_cast<int>(x.cols()));
  });
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

Rows rows_of(const Tensor& x) { return {x.data, x.row_stride}; }

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

float* allocate_states(const Context& ctx, const SweepPlan& plan, int64_t key_heads) {
  if (plan.states == 0) return nullptr;
  return static_cast<float*>(
      ctx.scratch
          ->allocate("linear attention states", DType::f32, {plan.states, key_heads * plan.state_floats})
          .data);
}

}  // namespace

SweepPlan plan_segments(int64_t rows, int64_t sequences, int64_t tasks) {
  // Two blocks on each of an H200's multiprocessors; below kShortest rows a state costs more than it spares.
  constexpr int64_t kBlocks = 264, kShortest = 512, kMultiple = 64;
  const int64_t even = (rows * tasks / kBlocks + kMultiple - 1) / kMultiple * kMultiple;
  SweepPlan plan;
  plan.segment_rows = std::max(kShortest, even);
  if (plan.segment_rows >= rows) plan.segment_rows = (rows / kMultiple + 1) * kMultiple;
  plan.states = rows / plan.segment_rows;
  plan.slots = plan.states + sequences;
  plan.state_floats = 1;
  return plan;
}

void linear_attention(const Context& ctx, const LinearAttentionParams& params, const Tensor& q,
                      const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, Tensor o,
                      Tensor denominator) {
  ArenaScope scope(*ctx.scratch);
  const SweepPlan plan = any_sweep_plan(q.rows(), cu_seqlens.rows() - 1, q.dim(1), q.dim(2));
  float* states = allocate_states(ctx, plan, k.dim(1));
  if (ctx.rehearsal || q.numel() == 0) return;
  SweepTask task = make_task(params, q, k, v, denominator, cu_seqlens, plan);
  task.states = states;
  task.out = rows_of(o);
  const cudaStream_t stream = stream_of(ctx);
  clear(task, o, stream);
  if (params.normalise) clear(task, denominator, stream);
  any_sweep(Sweep::forward, q.dtype, o.dtype, plan, task, stream);
}

void linear_attention_backward(const Context& ctx, const LinearAttentionParams& params, const Tensor& dout,
                               const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                               const Tensor& denominator, const Tensor& cu_seqlens, Tensor dq, Tensor dk,
                               Tensor dv) {
  ArenaScope scope(*ctx.scratch);
  const SweepPlan plan = any_sweep_plan(q.rows(), cu_seqlens.rows() - 1, q.dim(1), q.dim(2));
  float* states = allocate_states(ctx, plan, k.dim(1));
  const Tensor dd =
      params.normalise ? ctx.scratch->allocate("dd", DType::f32, {q.rows(), q.dim(1)}) : Tensor();
  if (ctx.rehearsal || q.numel() == 0) return;
  SweepTask task = make_task(params, q, k, v, denominator, cu_seqlens, plan);
  task.states = states;
  task.dout = rows_of(dout);
  const cudaStream_t stream = stream_of(ctx);
  for (const Tensor& x : {dq, dk, dv}) clear(task, x, stream);
  if (params.normalise) {
    task.dd = dd.as<float>();
    const int64_t blocks = (q.rows() * q.dim(1) * 32 + kThreads - 1) / kThreads;
    visit_device_dtype(q.dtype, [&](auto t) {
      const auto run = [&](auto g) {
        output_dots<decltype(t), decltype(g)>
            <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(task, rows_of(o), dd.as<float>());
      };
      dout.dtype == DType::f32 ? run(float{}) : run(t);
    });
    check_launch("linear_attention_backward");
  }
  for (auto [sweep, gradient] : {std::pair{Sweep::dq, &dq}, {Sweep::dk, &dk}, {Sweep::dv, &dv}}) {
    task.out = rows_of(*gradient);
    any_sweep(sweep, q.dtype, dout.dtype, plan, task, stream);
  }
}

}  // namespace kernels::cuda

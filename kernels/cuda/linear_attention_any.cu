// Linear attention's sweeps for any type and width, in fp32 arithmetic: tiles of 32 rows in shared memory.
#include "kernels/cuda/check.h"
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/linear_attention.h"

namespace kernels::cuda {

namespace {

constexpr int kTile = 32, kThreads = 256, kPerThread = kTile * kTile / kThreads;
constexpr int kLd = kTile + 1;

// Elements of a, b and c. T: the compute type; G: the type of o and do.
template <Sweep kSweep, class T, class G>
struct Elements {
  static constexpr bool kExtra = kSweep == Sweep::dq || kSweep == Sweep::dk;
  const SweepTask& t;
  int head, key_head;

  template <class X>
  __device__ float at(const Rows& x, int row, int h, int d) const {
    return to_float(static_cast<const X*>(x.data)[row * x.stride + int64_t{h} * t.width + d]);
  }
  __device__ float query(int row, int d) const { return phi(at<T>(t.q, row, head, d)); }
  __device__ float key(int row, int d) const { return phi(at<T>(t.k, row, key_head, d)); }
  __device__ float value(int row, int d) const { return d < t.width ? at<T>(t.v, row, key_head, d) : 1.0f; }
  __device__ float gradient(int row, int d) const {
    if (d == t.width) return t.dd ? t.dd[int64_t{row} * t.heads + head] : 0.0f;
    const float dout = at<G>(t.dout, row, head, d);
    return t.denominator ? dout / t.denominator[row * t.denominator_stride + head] : dout;
  }
  __device__ float a(int row, int d) const {
    if constexpr (kSweep == Sweep::forward) return query(row, d);
    if constexpr (kSweep == Sweep::dq) return gradient(row, d);
    if constexpr (kSweep == Sweep::dk) return value(row, d);
    if constexpr (kSweep == Sweep::dv) return key(row, d);
  }
  __device__ float b(int row, int d) const {
    if constexpr (kSweep == Sweep::forward) return key(row, d);
    if constexpr (kSweep == Sweep::dq) return value(row, d);
    if constexpr (kSweep == Sweep::dk) return gradient(row, d);
    if constexpr (kSweep == Sweep::dv) return query(row, d);
  }
  __device__ float c(int row, int d) const {
    if constexpr (kSweep == Sweep::forward) return value(row, d);
    if constexpr (kSweep == Sweep::dq) return key(row, d);
    if constexpr (kSweep == Sweep::dk) return query(row, d);
    if constexpr (kSweep == Sweep::dv) return gradient(row, d);
  }
};

struct Tiles {
  float a[kTile][kLd], b[kTile][kLd], c[kTile][kLd], p[kTile][kLd];
};

// Column kTile of a block's c is 1 in the forward: its sums are the denominators.
template <class E>
__device__ void load_c(const E& e, int row, int last, int column, float (&c)[kTile][kLd], bool ones) {
  for (int i = threadIdx.x; i < kTile * kLd; i += kThreads) {
    const int r = i / kLd, n = i % kLd;
    const bool inside = row + r < last;
    if (n == kTile)
      c[r][n] = inside && ones ? 1.0f : 0.0f;
    else
      c[r][n] = inside && column + n < e.t.width ? e.c(row + r, column + n) : 0.0f;
  }
}

// state[d][n] += sum_r b[r][d] c[r][n] for the tile of d that b holds.
__device__ void add_to_state(const Tiles& s, float* state) {
  const int d = threadIdx.x / 8, lane = threadIdx.x % 8;
  for (int n = lane; n < kLd; n += 8) {
    float sum = 0;
    for (int r = 0; r < kTile; ++r) sum = fmaf(s.b[r][d], s.c[r][n], sum);
    state[d * kLd + n] += sum;
  }
}

// Adds one tile of rows: intra-tile products p and, once per tile, what the state holds.
template <bool kStateOnly, class E>
__device__ void sweep_tile(const E& e, int row, int last, int inner, bool with_state, Tiles& s, float* state,
                           float (&p)[kPerThread], float (&y)[kPerThread + 1]) {
  const int i = threadIdx.x / 8, lane = threadIdx.x % 8;
  for (int k = 0; k < inner; k += kTile) {
    __syncthreads();
#pragma unroll 2
    for (int x = threadIdx.x; x < kTile * kTile; x += kThreads) {
      const int r = x / kTile, d = x % kTile;
      const bool inside = row + r < last && k + d < inner;
      s.b[r][d] = inside ? e.b(row + r, k + d) : 0.0f;
      if (!kStateOnly) s.a[r][d] = inside ? e.a(row + r, k + d) : 0.0f;
    }
    __syncthreads();
    if (!kStateOnly) {
      for (int d = 0; d < kTile; ++d) {
        const float a = s.a[i][d];
        for (int x = 0; x < kPerThread; ++x) p[x] = fmaf(a, s.b[lane + 8 * x][d], p[x]);
        if (!with_state) continue;
        for (int x = 0; x < kPerThread; ++x) y[x] = fmaf(a, state[(k + d) * kLd + lane + 8 * x], y[x]);
        y[kPerThread] = fmaf(a, state[(k + d) * kLd + kTile], y[kPerThread]);
      }
      __syncthreads();
    }
    add_to_state(s, state + k * kLd);
  }
}

template <bool kUp>
__device__ void add_causal(Tiles& s, const float (&p)[kPerThread], float (&y)[kPerThread + 1]) {
  const int i = threadIdx.x / 8, lane = threadIdx.x % 8;
  for (int x = 0; x < kPerThread; ++x) {
    const int j = lane + 8 * x;
    s.p[i][j] = (kUp ? j <= i : j >= i) ? p[x] : 0.0f;
  }
  __syncthreads();
  for (int j = kUp ? 0 : i; j < (kUp ? i + 1 : kTile); ++j) {
    for (int x = 0; x < kPerThread; ++x) y[x] = fmaf(s.p[i][j], s.c[j][lane + 8 * x], y[x]);
    y[kPerThread] = fmaf(s.p[i][j], s.c[j][kTile], y[kPerThread]);
  }
  __syncthreads();
}

template <Sweep kSweep, class T, class G>
__device__ void store(const SweepTask& t, const Elements<kSweep, T, G>& e, int row, int head, int column,
                      const float (&y)[kPerThread + 1]) {
  using Out = std::conditional_t<kSweep == Sweep::forward, G, T>;
  Out* out = static_cast<Out*>(t.out.data) + row * t.out.stride + int64_t{head} * t.width;
  const float denominator = y[kPerThread] + t.eps;
  const bool divide = kSweep == Sweep::forward && t.denominator;
  if (divide && column == 0 && threadIdx.x % 8 == 0)
    t.denominator[row * t.denominator_stride + head] = denominator;
  for (int x = 0; x < kPerThread; ++x) {
    const int n = column + static_cast<int>(threadIdx.x % 8) + 8 * x;
    if (n >= t.width) continue;
    float value = divide ? y[x] / denominator : y[x];
    if (kSweep == Sweep::dq) value *= fminf(e.query(row, n), 1.0f);
    if (kSweep == Sweep::dk) value *= fminf(e.key(row, n), 1.0f);
    out[n] = from_float<Out>(value);
  }
}

// A block: one segment, one head of the result, kTile columns of it.
template <Sweep kSweep, bool kStateOnly, class T, class G>
__global__ void __launch_bounds__(kThreads) any_sweep(const SweepTask t) {
  constexpr bool kUp = ascending(kSweep);
  extern __shared__ float state[];
  __shared__ Tiles s;
  const int blocks = (t.width + kTile - 1) / kTile, group = t.heads / t.key_heads;
  const int out_heads = kStateOnly || !kUp ? t.key_heads : t.heads;
  const int block = blockIdx.x % blocks, head = blockIdx.x / blocks % out_heads;
  const Segment segment = find_segment<kStateOnly, kUp>(t, blockIdx.x / blocks / out_heads);
  if (segment.first == segment.last) return;
  const int key_head = out_heads == t.heads ? head / group : head, sources = kUp ? 1 : group;
  Elements<kSweep, T, G> e{t, kUp ? (kStateOnly ? head * group : head) : 0, key_head};
  const int inner = t.width + e.kExtra, padded = (inner + kTile - 1) / kTile * kTile;
  const auto state_of = [&](int index) {
    const int64_t slot = segment.base + index - (kUp ? 0 : 1);
    return t.states + ((slot * t.key_heads + key_head) * blocks + block) * padded * kLd;
  };
  for (int i = threadIdx.x; i < padded * kLd; i += kThreads) {
    float sum = 0;
    const int from = kUp ? 0 : segment.index + 1, to = kUp ? segment.index : segment.count;
    for (int index = from; !kStateOnly && index < to; ++index) sum += state_of(index)[i];
    state[i] = sum;
  }
  const int tiles = (segment.last - segment.first + kTile - 1) / kTile;
  for (int tile = 0; tile < tiles; ++tile) {
    const int row = segment.first + (kUp ? tile : tiles - 1 - tile) * kTile;
    float y[kPerThread + 1] = {};
    for (int source = 0; source < sources; ++source) {
      if (!kUp) e.head = key_head * group + source;
      float p[kPerThread] = {};
      load_c(e, row, segment.last, block * kTile, s.c, kSweep == Sweep::forward);
      sweep_tile<kStateOnly>(e, row, segment.last, inner, source == 0, s, state, p, y);
      if (!kStateOnly) add_causal<kUp>(s, p, y);
      __syncthreads();
    }
    const int mine = row + static_cast<int>(threadIdx.x) / 8;
    if (!kStateOnly && mine < segment.last) store(t, e, mine, head, block * kTile, y);
  }
  if (!kStateOnly) return;
  __syncthreads();
  for (int i = threadIdx.x; i < padded * kLd; i += kThreads) state_of(segment.index)[i] = state[i];
}

size_t state_floats(int width) { return static_cast<size_t>((width + 1 + kTile - 1) / kTile * kTile) * kLd; }

template <class Kernel>
void launch(Kernel* kernel, int64_t grid, const SweepTask& task, cudaStream_t stream) {
  const size_t bytes = state_floats(task.width) * sizeof(float);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "linear_attention");
  kernel<<<static_cast<unsigned>(grid), kThreads, bytes, stream>>>(task);
  check_launch("linear_attention");
}

}  // namespace

SweepPlan any_sweep_plan(int64_t rows, int64_t sequences, int64_t heads, int64_t width) {
  check_shared_memory("linear_attention", width, state_floats(static_cast<int>(width)) * sizeof(float));
  const int64_t blocks = (width + kTile - 1) / kTile;
  SweepPlan plan = plan_segments(rows, sequences, heads * blocks, 4 * kMultiprocessors);
  plan.state_floats *= blocks * static_cast<int64_t>(state_floats(static_cast<int>(width)));
  return plan;
}

void any_sweep(Sweep sweep, DType compute, DType output, const SweepPlan& plan, const SweepTask& task,
               cudaStream_t stream) {
  const int blocks = (task.width + kTile - 1) / kTile;
  visit_device_dtype(compute, [&](auto t) {
    const auto run = [&](auto g, auto kind) {
      constexpr Sweep kSweep = decltype(kind)::value;
      using T = decltype(t);
      using G = decltype(g);
      const int64_t heads = ascending(kSweep) ? task.heads : task.key_heads;
      if (plan.states > 0)
        launch(any_sweep<kSweep, true, T, G>, plan.states * task.key_heads * blocks, task, stream);
      launch(any_sweep<kSweep, false, T, G>, plan.slots * heads * blocks, task, stream);
    };
    visit_sweep(sweep, [&](auto kind) { output == DType::f32 ? run(float{}, kind) : run(t, kind); });
  });
}

}  // namespace kernels::cuda

#include <limits>

#include "kernels/cpu/optimizer_rules.h"
#include "kernels/cuda/device/map.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/ops/optimizer.h"

namespace kernels::cuda {

namespace {

// Sums have the same order on every device: a fixed number of blocks takes turns through the buffers.
constexpr int kThreads = 256, kSumBlocks = 528, kUpdateBlocks = 2112, kFinishThreads = 1024;

struct DeviceSegment {
  int64_t begin;
  int64_t end : 62;
  uint64_t decay : 1, trainable : 1;
};
static_assert(sizeof(DeviceSegment) == 16);

// Segments travel as kernel arguments: nothing is copied from host memory when a step is recorded.
constexpr int kSegmentsPerLaunch = 240;
struct SegmentBatch {
  DeviceSegment at[kSegmentsPerLaunch];
};

__global__ void segments_kernel(const __grid_constant__ SegmentBatch batch, int count, DeviceSegment* to) {
  if (threadIdx.x < count) to[threadIdx.x] = batch.at[threadIdx.x];
}

const DeviceSegment* upload(const Context& ctx, std::span<const Segment> segments, const Tensor& memory) {
  auto* device = static_cast<DeviceSegment*>(memory.data);
  for (size_t first = 0; first < segments.size(); first += kSegmentsPerLaunch) {
    const size_t count = std::min<size_t>(kSegmentsPerLaunch, segments.size() - first);
    SegmentBatch batch{};
    for (size_t i = 0; i < count; ++i) {
      const Segment& s = segments[first + i];
      batch.at[i].begin = s.begin;
      batch.at[i].end = s.begin + s.count;
      batch.at[i].decay = s.decay;
      batch.at[i].trainable = s.trainable;
    }
    segments_kernel<<<1, 256, 0, stream_of(ctx)>>>(batch, static_cast<int>(count), device + first);
    check_launch("uploading segments");
  }
  return device;
}

Tensor segment_memory(Arena& scratch, size_t count) {
  return scratch.allocate("segments", DType::u8, {static_cast<int64_t>((count + 1) * sizeof(DeviceSegment))});
}

// A thread's way through the ascending segments.
struct SegmentWalk {
  const DeviceSegment* segments;
  int count, index = -1;
  DeviceSegment now{};  // the first segment that ends behind the last element asked for
  __device__ SegmentWalk(const DeviceSegment* segments, int count) : segments(segments), count(count) {
    now.begin = 0, now.end = 0;
  }
  // To the first segment that ends behind element i, whatever lies between.
  __device__ void jump(int64_t i) {
    int low = 0, high = count;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (segments[middle].end > i)
        high = middle;
      else
        low = middle + 1;
    }
    index = low;
    if (index < count) now = segments[index];
  }
  // Elements may only go up. False when element i is in no trainable segment.
  __device__ bool find(int64_t i) {
    while (i >= now.end && index < count) {
      if (++index < count) now = segments[index];
    }
    return index < count && i >= now.begin && now.trainable;
  }
  // Whether all of [i, i + n) is treated as element i is, which was just found.
  __device__ bool uniform(int64_t i, int64_t n) const {
    return index < count && i >= now.begin && i + n <= now.end;
  }
};

// Where own elements stand in the whole: Shard::place, for elements of which 32 are never apart.
struct Places {
  static constexpr int64_t kTogether = 32;
  uint32_t piece = ~0u;  // in units of kTogether
  int64_t first = 0, apart = 0;
  Places() = default;
  explicit Places(const Shard& shard) {
    if (shard.ranks == 1) return;
    piece = static_cast<uint32_t>(shard.piece / kTogether);
    first = shard.rank * shard.piece;
    apart = shard.stripe() - shard.piece;
  }
  __device__ uint32_t piece_of(int64_t own) const { return static_cast<uint32_t>(own / kTogether) / piece; }
  __device__ int64_t of(int64_t own) const { return own + first + piece_of(own) * apart; }
  // The end of the piece that has element `own`.
  __device__ int64_t end(int64_t own) const { return (int64_t{piece_of(own)} + 1) * piece * kTogether; }
};

// Calls each(walk, i, std::integral_constant<int, n>) for the runs of n = N or 1 elements in [first, last) of
// this thread that lie in a trainable segment.
template <int N, typename Fn>
__device__ __forceinline__ void for_elements(const DeviceSegment* segments, int segment_count, int64_t first,
                                             int64_t last, Fn&& each) {
  SegmentWalk walk(segments, segment_count);
  const int64_t step = int64_t{gridDim.x} * kThreads * N;
  int64_t i = first + (int64_t{blockIdx.x} * kThreads + threadIdx.x) * N;
  walk.jump(i);
  for (; i < last; i += step) {
    const bool found = walk.find(i);
    if (N > 1 && i + N <= last && walk.uniform(i, N)) {
      if (found) each(walk, i, std::integral_constant<int, N>{});
    } else {
      for (int64_t e = i; e < min(last, i + N); ++e)
        if (walk.find(e)) each(walk, e, std::integral_constant<int, 1>{});
    }
  }
}

// A block's share of the statistics.
struct Share {
  double squares;
  int64_t nonfinite;
  int32_t first, unused;
};

constexpr int kNone = std::numeric_limits<int32_t>::max();

struct Least {
  __device__ int operator()(int a, int b) const { return a < b ? a : b; }
};
struct SharedSums {
  double squares[33];
  long long nonfinite[33];
  int first[33];
};

__device__ Share reduce_shares(Share s, SharedSums& shared) {
  s.squares = block_reduce<Sum>(s.squares, shared.squares, 0.0);
  s.nonfinite = block_reduce<Sum>(static_cast<long long>(s.nonfinite), shared.nonfinite, 0LL);
  s.first = block_reduce<Least>(s.first, shared.first, kNone);
  return s;
}

// Vectors of a thread that are fetched together; a block takes a chunk of them after the other.
constexpr int kChunkVectors = 8;
template <int N>
constexpr int64_t kChunk = int64_t{kThreads} * kChunkVectors* N;

__device__ __forceinline__ void count_nonfinite(float x, int segment, Share& share) {
  if (isfinite(x)) return;
  ++share.nonfinite;
  share.first = min(share.first, segment);
}

// A thread's vectors of a chunk.
template <int N>
struct ChunkPart {
  Vector<float, N> v[kChunkVectors];
  static __device__ __forceinline__ int at(int k) {
    return (k * kThreads + static_cast<int>(threadIdx.x)) * N;
  }

  __device__ __forceinline__ void load(const float* g) {
#pragma unroll
    for (int k = 0; k < kChunkVectors; ++k) v[k] = load_vector<float, N>(g + at(k));
  }

  // All of one segment. Squares of fp32 numbers are exact in fp64 and their sum is finite as long as they
  // are: elements are looked at one by one only where it is not.
  __device__ __forceinline__ void add(int segment, Share& share) const {
    double squares[2] = {};
#pragma unroll
    for (int k = 0; k < kChunkVectors; ++k)
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const double x = v[k].at[j];
        squares[(k * N + j) % 2] = fma(x, x, squares[(k * N + j) % 2]);
      }
    const double sum = squares[0] + squares[1];
    share.squares += sum;
    if (isfinite(sum)) return;
#pragma unroll
    for (int k = 0; k < kChunkVectors; ++k)
#pragma unroll
      for (int j = 0; j < N; ++j) count_nonfinite(v[k].at[j], segment, share);
  }
};

// A chunk of several segments, gaps, or the end; g: where element 0 would be.
template <int N>
__device__ __forceinline__ void add_mixed(SegmentWalk walk, const float* g, int64_t begin, int64_t end,
                                          Share& share) {
#pragma unroll 1
  for (int k = 0; k < kChunkVectors; ++k) {
    const int64_t i = begin + ChunkPart<N>::at(k);
    if (i >= end) return;
    float x[N];
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = g[min(i + j, end - 1)];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (i + j >= end || !walk.find(i + j)) continue;
      share.squares = fma(double{x[j]}, double{x[j]}, share.squares);
      count_nonfinite(x[j], walk.index, share);
    }
  }
}

// A block goes through one run of own elements, in chunks that no piece ends within.
template <int N>
__global__ void __launch_bounds__(kThreads, 4)
    statistics_kernel(const DeviceSegment* segments, int segment_count, const float* gradients, int64_t count,
                      const Places places, Share* shares) {
  __shared__ SharedSums shared;
  Share mine{0, 0, kNone, 0};
  const int64_t chunks = (count + kChunk<N> - 1) / kChunk<N>;
  const int64_t begin = chunks * blockIdx.x / gridDim.x * kChunk<N>,
                end = min(count, chunks * (blockIdx.x + 1) / gridDim.x * kChunk<N>);
  SegmentWalk walk(segments, segment_count);
  walk.jump(begin);
  for (int64_t i = begin, next; i < end; i = next) {
    next = min(min(end, i + kChunk<N>), places.end(i));
    const float* g = gradients + (places.of(i) - i);
    const bool found = walk.find(i);
    if (next < i + kChunk<N> || !walk.uniform(i, kChunk<N>)) {
      add_mixed<N>(walk, g, i, next, mine);
    } else if (found) {
      ChunkPart<N> part;
      part.load(g + i);
      part.add(walk.index, mine);
    }
  }
  mine = reduce_shares(mine, shared);
  if (threadIdx.x == 0) shares[blockIdx.x] = mine;
}

// The norm of gradients whose squares add up to `squares`.
__device__ float norm_of(double squares, const float* normaliser, const OptimizerState& state) {
  if (!isfinite(squares)) return __int_as_float(0x7f800000);
  return static_cast<float>(sqrt(squares) * fabs(double{*normaliser} / double{state.gradient_scale}));
}

// sums, if not null, gets the squares in its first entry and 0 in the others.
__global__ void __launch_bounds__(kFinishThreads)
    finish_statistics_kernel(const Share* shares, int count, const float* normaliser, double* sums,
                             OptimizerState* state) {
  __shared__ SharedSums shared;
  Share sum{0, 0, kNone, 0};
  for (int i = threadIdx.x; i < count; i += kFinishThreads) {
    sum.squares += shares[i].squares;
    sum.nonfinite += shares[i].nonfinite;
    sum.first = min(sum.first, shares[i].first);
  }
  sum = reduce_shares(sum, shared);
  if (sums && threadIdx.x < kOptimizerPieces) sums[threadIdx.x] = threadIdx.x == 0 ? sum.squares : 0;
  if (threadIdx.x != 0) return;
  state->gradient_scale = state->loss_scale;
  state->nonfinite = static_cast<int32_t>(min(sum.nonfinite, int64_t{kNone}));
  state->first_nonfinite = sum.nonfinite > 0 ? sum.first : -1;
  state->gradient_norm = norm_of(sum.squares, normaliser, *state);
}

__global__ void __launch_bounds__(kOptimizerPieces)
    norm_kernel(const double* sums, const float* normaliser, OptimizerState* state) {
  __shared__ double shared[33];
  const double sum = block_reduce<Sum>(sums[threadIdx.x], shared, 0.0);
  if (threadIdx.x != 0) return;
  state->nonfinite = !isfinite(sum);
  state->gradient_norm = norm_of(sum, normaliser, *state);
}

__global__ void seeds_kernel(const OptimizerState* state, const float* factors, int64_t count, float* seeds) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) seeds[i] = state->loss_scale * factors[i];
}

__global__ void rules_kernel(const LossScaleRules rules, OptimizerState* state) {
  cpu::apply_rules(rules, *state);
}

__global__ void factors_kernel(const AdamWParams params, const float* normaliser, OptimizerState* state,
                               cpu::AdamWFactors* factors) {
  *factors = cpu::begin_update(params, *normaliser, *state);
}

struct Update {
  const DeviceSegment* segments;
  int segment_count;
  const cpu::AdamWFactors* factors;
  float decay;
  int64_t first = 0, last = 0;
  Places places;
  const float* gradients;
  float *master, *m, *v;
};

template <typename W, int N>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const Update u, W* weights) {
  const cpu::AdamWFactors f = *u.factors;
  if (f.skip) return;
  const float scale = static_cast<float>(f.gradient), unbias1 = static_cast<float>(f.unbias1),
              unbias2 = static_cast<float>(f.unbias2), rest1 = 1 - f.beta1, rest2 = 1 - f.beta2;
  const auto update = [&](const SegmentWalk& walk, int64_t i, auto width) {
    constexpr int n = decltype(width)::value;
    const int64_t place = u.places.of(i);
    const auto g = load_vector<float, n>(u.gradients + place);
    auto m = load_vector<float, n>(u.m + i), v = load_vector<float, n>(u.v + i),
         master = load_vector<float, n>(u.master + i);
    const float decay = walk.now.decay ? u.decay : 0.0f;
    Vector<W, n> w;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float gradient = scale * g.at[j];
      m.at[j] = f.beta1 * m.at[j] + rest1 * gradient;
      v.at[j] = f.beta2 * v.at[j] + rest2 * (gradient * gradient);
      const float step = __fdividef(m.at[j] * unbias1, sqrtf(v.at[j] * unbias2) + f.eps);
      master.at[j] -= f.learning_rate * (step + decay * master.at[j]);
      w.at[j] = from_float<W>(master.at[j]);
    }
    store_global(u.m + i, m);
    store_global(u.v + i, v);
    store_global(u.master + i, master);
    store_global(weights + place, w);
  };
  for_elements<N>(u.segments, u.segment_count, u.first, u.last, update);
}

OptimizerState* state_of(const Tensor& state) { return static_cast<OptimizerState*>(state.data); }

int blocks_for(int64_t count, int most, int elements) {
  const int64_t per_block = int64_t{kThreads} * elements;
  return static_cast<int>(std::clamp<int64_t>((count + per_block - 1) / per_block, 1, most));
}

void update(const Context& ctx, const Update& u, const OptimizerBuffers& buffers) {
  const Tensor* all[] = {&buffers.gradients, &buffers.master, &buffers.m, &buffers.v, &buffers.weights};
  const bool wide = std::all_of(std::begin(all), std::end(all), [](const Tensor* t) {
    return reinterpret_cast<uintptr_t>(t->data) % 16 == 0;
  });
  visit_device_dtype(buffers.weights.dtype, [&](auto tag) {
    using W = decltype(tag);
    auto* weights = static_cast<W*>(buffers.weights.data);
    const int blocks = blocks_for(u.last - u.first, kUpdateBlocks, wide ? 4 : 1);
    if (wide)
      adamw_kernel<W, 4><<<blocks, kThreads, 0, stream_of(ctx)>>>(u, weights);
    else
      adamw_kernel<W, 1><<<blocks, kThreads, 0, stream_of(ctx)>>>(u, weights);
  });
  check_launch("adamw");
}

}  // namespace

void loss_seeds(const Context& ctx, const Tensor& state, const Tensor& factors, Tensor seeds) {
  if (seeds.numel() == 0) return;
  seeds_kernel<<<1, 32, 0, stream_of(ctx)>>>(state_of(state), factors.as<float>(), seeds.numel(),
                                             seeds.as<float>());
  check_launch("loss_seeds");
}

void gradient_statistics(const Context& ctx, std::span<const Segment> segments, const Tensor& normaliser,
                         OptimizerBuffers& buffers) {
  constexpr auto kName = "gradient_statistics";
  const ArenaScope scope(*ctx.scratch);
  const Tensor memory = segment_memory(*ctx.scratch, segments.size());
  const Tensor shares = ctx.scratch->allocate("gradient statistics", DType::u8,
                                              {kSumBlocks * static_cast<int64_t>(sizeof(Share))});
  if (ctx.rehearsal) return;
  const DeviceSegment* device = upload(ctx, segments, memory);
  const auto count = static_cast<int>(segments.size());
  const float* g = buffers.gradients.as<float>();
  const int64_t elements = buffers.gradients.numel() / buffers.shard.ranks;
  const Places places(buffers.shard);
  const bool wide = reinterpret_cast<uintptr_t>(g) % 16 == 0;
  auto* out = static_cast<Share*>(shares.data);
  const int blocks = blocks_for(elements, kSumBlocks, (wide ? 4 : 1) * kChunkVectors);
  if (wide)
    statistics_kernel<4><<<blocks, kThreads, 0, stream_of(ctx)>>>(device, count, g, elements, places, out);
  else
    statistics_kernel<1><<<blocks, kThreads, 0, stream_of(ctx)>>>(device, count, g, elements, places, out);
  check_launch(kName);
  double* sums = buffers.sums ? buffers.sums.as<double>() : nullptr;
  finish_statistics_kernel<<<1, kFinishThreads, 0, stream_of(ctx)>>>(out, blocks, normaliser.as<float>(),
                                                                     sums, state_of(buffers.state));
  check_launch(kName);
}

void gradient_norm(const Context& ctx, const Tensor& normaliser, OptimizerBuffers& buffers) {
  norm_kernel<<<1, kOptimizerPieces, 0, stream_of(ctx)>>>(buffers.sums.as<double>(), normaliser.as<float>(),
                                                          state_of(buffers.state));
  check_launch("gradient_norm");
}

void update_loss_scale(const Context& ctx, const LossScaleRules& rules, OptimizerBuffers& buffers) {
  rules_kernel<<<1, 1, 0, stream_of(ctx)>>>(rules, state_of(buffers.state));
  check_launch("update_loss_scale");
}

void adamw(const Context& ctx, std::span<const Segment> segments, const Tensor& normaliser,
           const AdamWParams& params, OptimizerBuffers& buffers, const UpdateParts& parts) {
  const ArenaScope scope(*ctx.scratch);
  const Tensor memory = segment_memory(*ctx.scratch, segments.size());
  const Tensor factors =
      ctx.scratch->allocate("adamw factors", DType::u8, {static_cast<int64_t>(sizeof(cpu::AdamWFactors))});
  if (ctx.rehearsal) return;
  Update u{.segments = upload(ctx, segments, memory),
           .segment_count = static_cast<int>(segments.size()),
           .factors = static_cast<const cpu::AdamWFactors*>(factors.data),
           .decay = params.weight_decay,
           .places = Places(buffers.shard),
           .gradients = buffers.gradients.as<float>(),
           .master = buffers.master.as<float>(),
           .m = buffers.m.as<float>(),
           .v = buffers.v.as<float>()};
  factors_kernel<<<1, 1, 0, stream_of(ctx)>>>(params, normaliser.as<float>(), state_of(buffers.state),
                                              static_cast<cpu::AdamWFactors*>(factors.data));
  check_launch("adamw");
  const int64_t own = buffers.master.numel(), step = parts.elements > 0 ? parts.elements : own;
  // A part begins with a short kernel: what follows the part ahead in another stream, such as an exchange,
  // finds multiprocessors when that ends, and not only when all of the part does.
  const int64_t lead = parts.updated ? (step / 8 / Places::kTogether + 1) * Places::kTogether : 0;
  for (int64_t first = 0; first < own; first += step) {
    const int64_t last = std::min(own, first + step);
    for (const int64_t end : {std::min(last, first + lead), last}) {
      u.last = end;
      if (u.first < u.last) update(ctx, u, buffers);
      u.first = end;
    }
    if (parts.updated) parts.updated(first, last);
  }
}

}  // namespace kernels::cuda

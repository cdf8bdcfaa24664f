#pragma once
// What a block of a causal sweep on the matrix units (linear_tiles.cuh) multiplies: the rows' tiles a, b, c
// on their way through two stages of shared memory, made into features in place, and where a lane finds them.
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/device/linear_sweep.cuh"
#include "kernels/cuda/device/mma.cuh"

namespace kernels::cuda {

constexpr int kChunk = 64, kTileThreads = 128;

struct TileTask {
  SweepTask sweep;  // dout: g, of the compute type, with do = f g for each row's power of two f
  Rows dv;          // the second result of the sweeps for keys; the first one is sweep.out
  // (H, N): x = f / denominator, y = -(g . o) or 0, z = max |g|, w = f.
  const float4* factors = nullptr;
};

template <int kD>
struct alignas(256) TileShared {
  uint4 tile[3][2][kChunk * kD / 8];
  uint4 p[kChunk * kChunk / 8];
  float4 factors[2][kChunk];
  float sums[2][kD];
  float inverse[kChunk];
};

template <Sweep kSweep, class T, int kD, bool kGrouped, bool kStateOnly>
class SweepOperands {
 public:
  __device__ SweepOperands(const TileTask& task, TileShared<kD>& shared, const Segment& segment, int head,
                           int key_head)
      : t(task),
        m(shared),
        first_row(segment.first),
        last_row(segment.last),
        begin_row(segment.first - segment.index * task.sweep.segment_rows),
        head(head),
        key_head(key_head) {}

 protected:
  static constexpr bool kUp = ascending(kSweep), kHalf = std::is_same_v<T, __half>;
  static constexpr bool kForward = kSweep == Sweep::forward;
  static constexpr bool kSlopes = !kStateOnly && (kSweep == Sweep::dq || kSweep == Sweep::dk);
  static constexpr bool kFactors = !kForward && !(kSweep == Sweep::dq && kStateOnly);
  static constexpr int kUnits = kD / 8;
  enum Tile { kA, kB, kC };

  const TileTask& t;
  TileShared<kD>& m;
  const int first_row, last_row, begin_row;  // of the segment, and where its sequence begins
  const int head, key_head;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  __device__ int row_of(int item, int chunks) const {
    const int chunk = kGrouped ? item / (t.sweep.heads / t.sweep.key_heads) : item;
    return first_row + (kUp ? chunk : chunks - 1 - chunk) * kChunk;
  }
  __device__ const T* from(const Rows& x, int row, int h) const {
    return static_cast<const T*>(x.data) + row * x.stride + h * kD;
  }

  // A thread fetches the same unit of every kStep-th row, and makes features of those.
  static constexpr int kStep = kTileThreads / kUnits, kSteps = kChunk / kStep;
  static constexpr uint32_t kStepBytes = kStep * kUnits * 16;  // rows 8 apart have the same places for units
  __device__ static uint32_t own_units(const uint4* tile) {
    return shared_address(tile) + unit_offset<kUnits>(threadIdx.x / kUnits, threadIdx.x % kUnits);
  }
  __device__ void fetch_tile(const uint4* tile, const Rows& x, int row, int h) const {
    const int first = threadIdx.x / kUnits, inside = last_row - row;
    const uint32_t to = own_units(tile);
    const T* at = from(x, row + first, h) + threadIdx.x % kUnits * 8;
    const int64_t step = x.stride * kStep;
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      copy_unit(to + i * kStepBytes, at + i * step, first + i * kStep < inside);
  }
  __device__ void fetch(int item, int chunks) const {
    const SweepTask& s = t.sweep;
    const int stage = item & 1, row = row_of(item, chunks);
    const int sources = kGrouped ? s.heads / s.key_heads : 1;
    const int query_head = kUp ? head : key_head * sources + item % sources;
    if constexpr (kFactors) {
      const int r = threadIdx.x;
      const float4* at = t.factors + int64_t{query_head} * s.rows + row;
      if (r < kChunk) copy_unit(shared_address(&m.factors[stage][r]), at + r, row + r < last_row);
      end_copies();
    }
    if constexpr (!kStateOnly) {
      const Rows& a = kForward ? s.q : kSweep == Sweep::dq ? s.dout : kSweep == Sweep::dk ? s.v : s.k;
      fetch_tile(m.tile[kA][stage], a, row, kUp ? head : key_head);
    }
    if constexpr (kSlopes) {
      const Rows& x = kSweep == Sweep::dq ? s.q : s.k;
      constexpr int kLines = kD / 64;  // of 128 bytes
      const int r = threadIdx.x / kLines;
      if (row + r < last_row) prefetch(from(x, row + r, kUp ? head : key_head) + threadIdx.x % kLines * 64);
    }
    const Rows& b = kForward ? s.k : kSweep == Sweep::dq ? s.v : kSweep == Sweep::dk ? s.dout : s.q;
    const Rows& c = kForward ? s.v : kSweep == Sweep::dq ? s.k : kSweep == Sweep::dk ? s.q : s.dout;
    fetch_tile(m.tile[kB][stage], b, row, kUp ? key_head : query_head);
    fetch_tile(m.tile[kC][stage], c, row, kUp ? key_head : query_head);
    end_copies();
  }

  // phi in place, of the units this thread has fetched; times the row's factor and `scale` where asked.
  template <bool kScaled>
  __device__ void make_features(uint4* tile, int stage, int inside, float scale) const {
    const int first = threadIdx.x / kUnits;
    char* own = reinterpret_cast<char*>(tile) + unit_offset<kUnits>(first, threadIdx.x % kUnits);
#pragma unroll 2
    for (int i = 0; i < kSteps; ++i) {
      auto* at = reinterpret_cast<uint32_t*>(own + i * kStepBytes);
      auto x = load_vector<uint32_t>(at);
      const int r = first + i * kStep;
      float factor = 1;
      if constexpr (kScaled) factor = m.factors[stage][r].x * scale;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t y;
        if constexpr (kScaled) {
          const float2 v = unpack<T>(x.at[j]);
          y = pack<T>(scaled_feature(v.x, factor), scaled_feature(v.y, factor));
        } else {
          y = elu_plus_one<T>(x.at[j]);
        }
        x.at[j] = r < inside ? y : 0;
      }
      store_vector(at, x);
    }
  }
  __device__ static float scaled_feature(float x, float factor) {
    const float y = ((x > 0 ? x : 0) + slope(x)) * factor;
    return kHalf && y > 65504.0f ? 65504.0f : y;
  }
  __device__ static float slope(float x) { return exp_fast(x > 0 ? 0 : x); }
  __device__ void make_operands(int stage, int inside, float scale) const {
    if constexpr (!kStateOnly && (kForward || kSweep == Sweep::dv))
      make_features<false>(m.tile[kA][stage], stage, inside, scale);
    if constexpr (kForward) make_features<false>(m.tile[kB][stage], stage, inside, scale);
    if constexpr (kSweep == Sweep::dv) make_features<true>(m.tile[kB][stage], stage, inside, scale);
    if constexpr (kSweep == Sweep::dq) make_features<false>(m.tile[kC][stage], stage, inside, scale);
    if constexpr (kSweep == Sweep::dk) make_features<true>(m.tile[kC][stage], stage, inside, scale);
  }
};

}  // namespace kernels::cuda

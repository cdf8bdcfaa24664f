#pragma once
// A block of a causal sweep (linear_sweep.cuh) on the matrix units: 64 rows at a time, head size 64 or 128.
// The state stays in registers, transposed: warp w holds its columns [w, w + 1) D / 4 of c by all D of b,
// which is at once the accumulator of c^T b and, rounded, the right operand of a S. The rows' tiles a, b, c
// come through two stages of shared memory. Per chunk: features in place | P = a b^T, masked, rounded to
// shared memory | y = a S + P c, then S += b^T c.
//
// fp16 has little range, so what is rounded to it is scaled by powers of two, exactly undone in fp32:
//   S by the warp's largest element; P = do . v by the chunk's largest |do|; phi(q) / denominator, which
//   shrinks as 1 / position, by the position. bf16 needs none of it.
#include "kernels/cuda/device/element.cuh"
#include "kernels/cuda/device/linear_sweep.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/reduce.cuh"

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

template <Sweep kSweep, class T, int kD, class Out, bool kGrouped, bool kStateOnly>
class TileSweep {
 public:
  __device__ TileSweep(const TileTask& task, TileShared<kD>& shared, const Segment& segment, int head,
                       int key_head)
      : t(task),
        m(shared),
        first_row(segment.first),
        last_row(segment.last),
        begin_row(segment.first - segment.index * task.sweep.segment_rows),
        head(head),
        key_head(key_head) {}

  __device__ void run(const Segment& segment) {
    const int sources = kGrouped ? t.sweep.heads / t.sweep.key_heads : 1;
    const int chunks = (last_row - first_row + kChunk - 1) / kChunk, items = chunks * sources;
    load_state(segment);
    fetch(0, chunks);
    if constexpr (kFactors) {
      wait_for_copies<1>();
      __syncthreads();
    }
    for (int item = 0; item < items; ++item) {
      const int stage = item & 1, row = row_of(item, chunks), source = kGrouped ? item % sources : 0;
      const int y_before = p_exponent - s_exponent;
      choose_exponents(stage, row);
      wait_for_copies<0>();
      make_operands(stage, last_row - row);
      __syncthreads();
      if (item + 1 < items) fetch(item + 1, chunks);
      if constexpr (!kStateOnly) scores(stage, row);
      if constexpr (kFactors) wait_for_copies<1>();
      if constexpr (kFactors || !kStateOnly) __syncthreads();
      if constexpr (!kStateOnly) {
        if (!kGrouped || source == 0) {
          from_state(stage);
        } else {
          scale_outputs(power_of_two(y_before - p_exponent + s_exponent));
        }
        Raw raw[2];
        if constexpr (kSlopes) load_slopes(row, 0, raw[0]);
        from_chunk(stage);
        if (!kGrouped || source == sources - 1) {
#pragma unroll
          for (int part = 0; part < 4; ++part) {
            if (kSlopes && part < 3) load_slopes(row, part + 1, raw[(part + 1) % 2]);
            store(stage, row, part, raw[part % 2]);
          }
        }
      }
      if (kStateOnly || item + 1 < items) update(stage);
    }
    if constexpr (kStateOnly) store_state(segment);
  }

 private:
  static constexpr bool kUp = ascending(kSweep), kHalf = std::is_same_v<T, __half>;
  static constexpr bool kSlopes = kSweep == Sweep::dq || kSweep == Sweep::dk;
  static constexpr bool kForward = kSweep == Sweep::forward, kSums = kSweep != Sweep::dv;
  static constexpr bool kFactors = !kForward && !(kSweep == Sweep::dq && kStateOnly);
  static constexpr int kUnits = kD / 8, kColumns = kD / 4;  // columns of c per warp
  static constexpr int kRowTiles = kColumns / 16, kColumnTiles = kColumns / 8;
  static constexpr int kPairs = kD / 8, kParts = 32 / kPairs;  // column sums: pairs of columns, parts of rows
  enum Tile { kA, kB, kC };

  const TileTask& t;
  TileShared<kD>& m;
  const int first_row, last_row, begin_row;  // of the segment, and where its sequence begins
  const int head, key_head;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float state[kRowTiles][kD / 8][4];  // times 2^s_exponent, as b or c is
  float y[4][kColumnTiles][4];        // of the chunk, times 2^(s_exponent - p_exponent)
  int s_exponent = 0, p_exponent = 0;
  int parity = 0;  // which of the two sums holds what lies before this item

  __device__ int row_of(int item, int chunks) const {
    const int chunk = kGrouped ? item / (t.sweep.heads / t.sweep.key_heads) : item;
    return first_row + (kUp ? chunk : chunks - 1 - chunk) * kChunk;
  }
  __device__ const T* from(const Rows& x, int row, int h) const {
    return static_cast<const T*>(x.data) + row * x.stride + h * kD;
  }

  // ---- tiles ----
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
    if constexpr (kSlopes && !kStateOnly) {
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

  // phi in place, of the units this thread has fetched; times the row's factor and 2^s_exponent where asked.
  template <bool kScaled>
  __device__ void make_features(uint4* tile, int stage, int inside) const {
    const int first = threadIdx.x / kUnits;
    const float scale = kHalf ? power_of_two(s_exponent) : 1;
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
  __device__ static float slope(float x) { return fast_exp(x > 0 ? 0 : x); }
  __device__ void make_operands(int stage, int inside) const {
    if constexpr (!kStateOnly && (kForward || kSweep == Sweep::dv))
      make_features<false>(m.tile[kA][stage], stage, inside);
    if constexpr (kForward) make_features<false>(m.tile[kB][stage], stage, inside);
    if constexpr (kSweep == Sweep::dv) make_features<true>(m.tile[kB][stage], stage, inside);
    if constexpr (kSweep == Sweep::dq) make_features<false>(m.tile[kC][stage], stage, inside);
    if constexpr (kSweep == Sweep::dk) make_features<true>(m.tile[kC][stage], stage, inside);
  }

  // Addresses of load_matrices: of a lane in the tile's corner, then 16 rows from `row` on and the 16 columns
  // from 16 `column` on. The corner of a tile is a multiple of 256 bytes, so that a column is one XOR away.
  // left: the left operand, and transposed the right operand of a product over rows. right: the right operand
  // by rows, and transposed the left operand of a product over rows.
  template <int kTileUnits>
  __device__ uint32_t left_corner(const uint4* tile) const {
    return shared_address(tile) + unit_offset<kTileUnits>(lane % 16, lane / 16);
  }
  __device__ uint32_t right_corner(const uint4* tile) const {
    return shared_address(tile) + unit_offset<kUnits>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  template <int kTileUnits>
  __device__ static uint32_t place(uint32_t corner, int row, int column) {
    return (corner ^ static_cast<uint32_t>(column << 5)) + row * kTileUnits * 16;
  }

  // ---- scales ----
  __device__ void choose_exponents(int stage, int row) {
    if (!kHalf) return;
    if constexpr (kForward) p_exponent = 4;
    if constexpr (kFactors) {
      const float4 low = m.factors[stage][lane], high = m.factors[stage][lane + 32];
      const int peak = exponent(warp_reduce<Max>(fmaxf(low.z, high.z)));
      const bool normalise = t.sweep.denominator != nullptr;
      const int position = row - begin_row;
      const int place = normalise ? exponent(static_cast<float>(position + 1)) + 2 : 0;
      if constexpr (!kUp)
        rescale_state(min(max(place - exponent(warp_reduce<Max>(fmaxf(low.w, high.w))), -100), 100));
      if constexpr (kSweep == Sweep::dv)
        p_exponent = normalise ? max(place - 14, 0) : 4;
      else
        p_exponent = min(max(peak + 4, -24), 24);  // chunks without any gradient stay in range
    }
  }
  __device__ void rescale_state(int e) {
    if (e == s_exponent) return;
    const float scale = power_of_two(e - s_exponent);
    s_exponent = e;
    for_each_pair([&](int, int, float& low, float& high) { low *= scale, high *= scale; });
  }
  __device__ void scale_outputs(float scale) {
    if constexpr (kHalf) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
          for (int x = 0; x < 4; ++x) y[i][j][x] *= scale;
    }
  }

  // ---- P ----
  // Warp w makes rows [16 w, 16 w + 16) of P, 32 columns at a time, as far as anything is visible.
  __device__ void scores(int stage, int row) {
    float sum[2] = {0, 0};
    const uint32_t left = left_corner<kUnits>(m.tile[kA][stage]) + warp * 16 * kUnits * 16,
                   right = right_corner(m.tile[kB][stage]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (kUp ? half * 32 > warp * 16 + 15 : half * 32 + 31 < warp * 16) continue;
      float p[4][4] = {};
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) {
        uint32_t a[4], b[4];
        load_matrices(place<kUnits>(left, 0, k), a);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          load_matrices(place<kUnits>(right, half * 32 + j * 16, k), b);
          multiply_add<T>(p[2 * j], a[0], a[1], a[2], a[3], b[0], b[1]);
          multiply_add<T>(p[2 * j + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
      }
      mask_and_store(stage, half, p, sum);
    }
    if constexpr (kForward)
      if (t.sweep.denominator) make_denominators(stage, row, sum);
  }
  __device__ void mask_and_store(int stage, int half, const float (&p)[4][4], float (&sum)[2]) {
    const float scale = kHalf ? power_of_two(-p_exponent) : 1;
    // Rows of P lie 128 bytes apart; r % 8 is lane / 4.
    char* to = reinterpret_cast<char*>(m.p) + (warp * 16 + lane / 4) * kChunk * 2 + lane % 4 * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const int r = warp * 16 + lane / 4 + 8 * x, c = half * 32 + j * 8 + lane % 4 * 2;
        float2 v = {p[j][2 * x], p[j][2 * x + 1]};
        if constexpr (kSweep == Sweep::dq) v.x += m.factors[stage][r].y, v.y += m.factors[stage][r].y;
        if constexpr (kSweep == Sweep::dk) v.x += m.factors[stage][c].y, v.y += m.factors[stage][c + 1].y;
        if (kUp ? c > r : c < r) v.x = 0;
        if (kUp ? c + 1 > r : c + 1 < r) v.y = 0;
        sum[x] += v.x + v.y;
        *reinterpret_cast<uint32_t*>(to + x * 8 * kChunk * 2 + (((half * 4 + j) ^ (lane / 4)) << 4)) =
            pack<T>(v.x * scale, v.y * scale);
      }
  }
  // z . a + the row of P + eps; two lanes share a row of this warp's sixteen.
  __device__ void make_denominators(int stage, int row, float (&sum)[2]) {
    const int mine = lane / 2, r = warp * 16 + mine, half = lane % 2;
    const float* z = m.sums[parity];
    float total = 0;
#pragma unroll
    for (int i = 0; i < kUnits / 2; ++i) {
      const int unit = i / 4 * 8 + i % 4 + half * 4;
      const uint4 x = *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(m.tile[kA][stage]) +
                                                      unit_offset<kUnits>(r, unit));
      const float4 low = *reinterpret_cast<const float4*>(z + unit * 8),
                   high = *reinterpret_cast<const float4*>(z + unit * 8 + 4);
      const float2 x0 = unpack<T>(x.x), x1 = unpack<T>(x.y), x2 = unpack<T>(x.z), x3 = unpack<T>(x.w);
      total += x0.x * low.x + x0.y * low.y + x1.x * low.z + x1.y * low.w;
      total += x2.x * high.x + x2.y * high.y + x3.x * high.z + x3.y * high.w;
    }
    total += __shfl_xor_sync(0xffffffffu, total, 1);
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      sum[x] += __shfl_xor_sync(0xffffffffu, sum[x], 1);
      sum[x] += __shfl_xor_sync(0xffffffffu, sum[x], 2);
    }
    const float upper = __shfl_sync(0xffffffffu, sum[0], mine % 8 * 4),
                lower = __shfl_sync(0xffffffffu, sum[1], mine % 8 * 4);
    total += (mine < 8 ? upper : lower) + t.sweep.eps;
    if (half != 0) return;
    m.inverse[r] = 1 / total;
    if (row + r < last_row) t.sweep.denominator[(row + r) * t.sweep.denominator_stride + head] = total;
  }

  // ---- y ----
  __device__ void from_state(int stage) {
    int e = 0;
    if constexpr (kHalf) {
      float peak = 0;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kD / 8; ++j)
#pragma unroll
          for (int x = 0; x < 4; ++x) peak = fmaxf(peak, fabsf(state[i][j][x]));
      e = min(max(exponent(warp_reduce<Max>(peak)) - 14, -100), 100);
    }
    const float scale = power_of_two(-e);
    const uint32_t left = left_corner<kUnits>(m.tile[kA][stage]);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int x = 0; x < 4; ++x) y[i][j][x] = 0;
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      uint32_t b[kColumnTiles][2];
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float(&s)[4] = state[j / 2][2 * k + h];
          b[j][h] = kHalf ? pack<T>(s[j % 2 * 2] * scale, s[j % 2 * 2 + 1] * scale)
                          : pack<T>(s[j % 2 * 2], s[j % 2 * 2 + 1]);
        }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t a[4];
        load_matrices(place<kUnits>(left, i * 16, k), a);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j)
          multiply_add<T>(y[i][j], a[0], a[1], a[2], a[3], b[j][0], b[j][1]);
      }
    }
    scale_outputs(power_of_two(e - p_exponent));
    if constexpr (kSlopes) add_extra(stage);
  }
  // The extra column of a times the extra row of the state.
  __device__ void add_extra(int stage) {
    const float scale = kHalf ? power_of_two(s_exponent - p_exponent) : 1;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      float2 sum = *reinterpret_cast<const float2*>(m.sums[parity] + warp * kColumns + j * 8 + lane % 4 * 2);
      sum.x *= scale, sum.y *= scale;
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const float a = kSweep == Sweep::dq ? m.factors[stage][i * 16 + lane / 4 + 8 * x].y : 1;
          y[i][j][2 * x] += a * sum.x;
          y[i][j][2 * x + 1] += a * sum.y;
        }
    }
  }
  __device__ void from_chunk(int stage) {
    const uint32_t corner = left_corner<kUnits>(m.tile[kC][stage]) ^ (warp * kRowTiles << 5),
                   left = left_corner<kChunk / 8>(m.p);
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      uint32_t c[kRowTiles][4];
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) load_matrices_transposed(place<kUnits>(corner, k * 16, j), c[j]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (kUp ? i < k : i > k) continue;
        uint32_t p[4];
        load_matrices(place<kChunk / 8>(left, i * 16, k), p);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j)
          multiply_add<T>(y[i][j], p[0], p[1], p[2], p[3], c[j / 2][j % 2 * 2], c[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  // Neighbouring lanes exchange halves of two column tiles, so that each has four columns in a row; again,
  // and it is undone.
  __device__ static void exchange(uint32_t& low, uint32_t& high) {
    const bool odd = threadIdx.x % 2;
    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
    (odd ? low : high) = other;
  }
  // What phi' is taken of: q or k at the places this lane stores, of half a chunk, rows 8 apart. Asked for
  // well before it is used.
  using Raw = uint2[4][kColumnTiles / 2];
  __device__ int stored_column() const { return warp * kColumns + lane % 2 * 8 + lane % 4 / 2 * 4; }
  __device__ void load_slopes(int row, int part, Raw& raw) const {
    const Rows& x = kSweep == Sweep::dq ? t.sweep.q : t.sweep.k;
    const int first = row + lane / 4 + 16 * part;
    const T* at = from(x, first, kSweep == Sweep::dq ? head : key_head) + stored_column();
#pragma unroll
    for (int i = 0; i < 2; ++i, at += 8 * x.stride)
#pragma unroll
      for (int j = 0; j < kColumnTiles / 2; ++j) {
        raw[i][j] = {0, 0};
        if (first + 8 * i < last_row) raw[i][j] = *reinterpret_cast<const uint2*>(at + j * 16);
      }
  }
  __device__ static void multiply_slopes(uint2 raw, float (&v)[4]) {
    exchange(raw.x, raw.y);
    const float2 low = unpack<T>(raw.x), high = unpack<T>(raw.y);
    v[0] *= slope(low.x);
    v[1] *= slope(low.y);
    v[2] *= slope(high.x);
    v[3] *= slope(high.y);
  }
  __device__ void store(int stage, int row, int part, const Raw& raw) const {
    const Rows& out = kSweep == Sweep::dv ? t.dv : t.sweep.out;
    const float unit = kHalf ? power_of_two(p_exponent - s_exponent) : 1;
    const bool divide = kForward && t.sweep.denominator;
    const int first = lane / 4 + 16 * part;
    Out* to = static_cast<Out*>(out.data) + (row + first) * out.stride + (kUp ? head : key_head) * kD;
#pragma unroll
    for (int i = 0; i < 2; ++i, to += 8 * out.stride) {
      const int r = first + 8 * i, x = 2 * i;
      const bool inside = row + r < last_row;
      float factor = unit;
      if (divide) factor *= m.inverse[r];
      if constexpr (kSweep == Sweep::dq) factor *= m.factors[stage][r].x;
#pragma unroll
      for (int j = 0; j < kColumnTiles; j += 2) {
        const float(&low)[4] = y[part][j], (&high)[4] = y[part][j + 1];
        float v[4] = {low[x] * factor, low[x + 1] * factor, high[x] * factor, high[x + 1] * factor};
        if constexpr (kSlopes) multiply_slopes(raw[i][j / 2], v);
        if constexpr (std::is_same_v<Out, float>) {
          Out* at = to + warp * kColumns + j * 8 + lane % 4 * 2;
          if (inside) *reinterpret_cast<float2*>(at) = {v[0], v[1]};
          if (inside) *reinterpret_cast<float2*>(at + 8) = {v[2], v[3]};
        } else {
          uint2 packed = {pack<T>(v[0], v[1]), pack<T>(v[2], v[3])};
          exchange(packed.x, packed.y);
          if (inside) *reinterpret_cast<uint2*>(to + stored_column() + j * 8) = packed;
        }
      }
    }
  }

  // ---- state ----
  __device__ void update(int stage) {
    const uint32_t corner = right_corner(m.tile[kC][stage]) ^ (warp * kRowTiles << 5),
                   right = left_corner<kUnits>(m.tile[kB][stage]);
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      uint32_t c[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) load_matrices_transposed(place<kUnits>(corner, k * 16, i), c[i]);
#pragma unroll
      for (int j = 0; j < kD / 16; ++j) {
        uint32_t b[4];
        load_matrices_transposed(place<kUnits>(right, k * 16, j), b);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          multiply_add<T>(state[i][2 * j], c[i][0], c[i][1], c[i][2], c[i][3], b[0], b[1]);
          multiply_add<T>(state[i][2 * j + 1], c[i][0], c[i][1], c[i][2], c[i][3], b[2], b[3]);
        }
      }
    }
    if constexpr (kSums) add_columns(stage);
  }
  // The extra row of the state (the extra column of c in the forward): sums of columns, weighted in dk.
  __device__ void add_columns(int stage) {
    constexpr int kLow = 8 / kParts;
    const int pair = warp * kPairs + lane % kPairs, part = lane / kPairs;
    const char* tile = reinterpret_cast<const char*>(m.tile[kForward ? kB : kC][stage]);
    float2 sum = {0, 0};
#pragma unroll 8
    for (int i = 0; i < kChunk / kParts; ++i) {
      const int r = i % kLow + part * kLow + i / kLow * 8;
      const float2 x = unpack<T>(
          *reinterpret_cast<const uint32_t*>(tile + unit_offset<kUnits>(r, pair / 4) + pair % 4 * 4));
      const float weight = kSweep == Sweep::dk ? m.factors[stage][r].y : 1;
      sum.x += weight * x.x;
      sum.y += weight * x.y;
    }
    const float unit = kHalf ? power_of_two(-s_exponent) : 1;
#pragma unroll
    for (int offset = kPairs; offset < 32; offset *= 2) {
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, offset);
      sum.y += __shfl_xor_sync(0xffffffffu, sum.y, offset);
    }
    if (lane < kPairs) {
      const float2 before = *own_sums(parity);
      *own_sums(parity ^ 1) = {before.x + sum.x * unit, before.y + sum.y * unit};
    }
    parity ^= 1;
  }
  __device__ float2* own_sums(int which) const {
    return reinterpret_cast<float2*>(m.sums[which] + 2 * (warp * kPairs + lane % kPairs));
  }

  // States lie in memory as (features, values), then the sums over the features.
  __device__ float* state_of(const Segment& segment, int index) const {
    const int64_t slot = segment.base + index - (kUp ? 0 : 1);
    return t.sweep.states + (slot * t.sweep.key_heads + key_head) * (kD * kD + kD);
  }
  template <class Fn>
  __device__ void for_each_pair(Fn fn) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kD / 8; ++j)
#pragma unroll
        for (int x = 0; x < 2; ++x)
          fn(warp * kColumns + i * 16 + lane / 4 + 8 * x, j * 8 + lane % 4 * 2, state[i][j][2 * x],
             state[i][j][2 * x + 1]);
  }
  __device__ void load_state(const Segment& segment) {
    for_each_pair([](int, int, float& low, float& high) { low = high = 0; });
    constexpr bool kTransposed = kForward || kSweep == Sweep::dv;
    float2 sums = {0, 0};
    const int begin = kUp ? 0 : segment.index + 1, end = kUp ? segment.index : segment.count;
    for (int index = begin; !kStateOnly && index < end; ++index) {
      const float* from = state_of(segment, index);
      for_each_pair([&](int n, int k, float& low, float& high) {
        low += kTransposed ? from[k * kD + n] : from[n * kD + k];
        high += kTransposed ? from[(k + 1) * kD + n] : from[n * kD + k + 1];
      });
      const float* more = from + kD * kD + 2 * (warp * kPairs + lane % kPairs);
      sums.x += more[0];
      sums.y += more[1];
    }
    if (lane < kPairs) *own_sums(parity) = sums;
  }
  __device__ void store_state(const Segment& segment) {
    float* to = state_of(segment, segment.index);
    const float unit = kHalf ? power_of_two(-s_exponent) : 1;
    for_each_pair([&](int n, int k, float& low, float& high) {
      *reinterpret_cast<float2*>(to + n * kD + k) = {low * unit, high * unit};
    });
    if (lane < kPairs) reinterpret_cast<float2*>(to + kD * kD)[warp * kPairs + lane] = *own_sums(parity);
  }
};

}  // namespace kernels::cuda

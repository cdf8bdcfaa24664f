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
#include "kernels/cuda/device/linear_operands.cuh"
#include "kernels/cuda/device/reduce.cuh"

namespace kernels::cuda {

template <Sweep kSweep, class T, int kD, class Out, bool kGrouped, bool kStateOnly>
class TileSweep : SweepOperands<kSweep, T, kD, kGrouped, kStateOnly> {
  using Base = SweepOperands<kSweep, T, kD, kGrouped, kStateOnly>;

 public:
  using Base::Base;

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
      make_operands(stage, last_row - row, kHalf ? power_of_two(s_exponent) : 1);
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
  using Base::begin_row, Base::first_row, Base::last_row, Base::head, Base::key_head, Base::lane, Base::warp;
  using Base::kA, Base::kB, Base::kC, Base::m, Base::t;
  using Base::kFactors, Base::kForward, Base::kHalf, Base::kSlopes, Base::kUnits, Base::kUp;
  using Base::row_of, Base::from, Base::fetch, Base::make_operands, Base::slope;
  static constexpr bool kSums = kSweep != Sweep::dv;
  static constexpr int kColumns = kD / 4;  // of c, per warp
  static constexpr int kRowTiles = kColumns / 16, kColumnTiles = kColumns / 8;
  static constexpr int kPairs = kD / 8, kParts = 32 / kPairs;  // column sums: pairs of columns, parts of rows

  float state[kRowTiles][kD / 8][4];  // times 2^s_exponent, as b or c is
  float y[4][kColumnTiles][4];        // of the chunk, times 2^(s_exponent - p_exponent)
  int s_exponent = 0, p_exponent = 0;
  int parity = 0;  // which of the two sums holds what lies before this item

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
                   right = right_corner<kUnits>(m.tile[kB][stage]);
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
    const uint32_t corner = right_corner<kUnits>(m.tile[kC][stage]) ^ (warp * kRowTiles << 5),
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

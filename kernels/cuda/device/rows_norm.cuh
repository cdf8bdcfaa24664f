#pragma once
// The norm ahead of a row-invariant product (kernels/cuda/linear_rows.cu), where a block has all inputs.
//
// With r = 1 / the norm's deviation, s the power of two next below r, m = s mean rounded to x's type:
//   y = W ((x - mean) r gain + shift) + bias
//     = r / s (W ((s x - m) gain) - (s mean - m) W gain) + (W shift + bias)
// s x - m and its product with the gain are rounded to x's type, in which two are computed at once; they are
// as large as the norm itself, so that this costs one rounding more and neither range nor cancellation. W
// gain, and W shift with the bias, come with the weights (pack_norm). The matrix units give the moments of x:
// sums and squares of a warp's inputs, relative to the first one of them, which keeps what cancels below the
// number of inputs.
#include "kernels/cuda/device/rows_product.cuh"

namespace kernels::cuda {

// How moments are put together. A lane has one row, which it shares with the lanes next to it.
template <int kColumns>
struct NormShares {
  static constexpr int kApart = kWarps / 2, kLanes = 4 / kColumns;
  static __device__ __forceinline__ int row(int lane) { return lane / kLanes; }
  // Of the warps first..first + kColumns, and those kApart further on.
  static __device__ __forceinline__ int first(int lane) { return lane % kLanes * kColumns; }
  // Over the lanes of a row; added in one order, whatever the number of columns.
  static __device__ __forceinline__ float sum(const float (&x)[kColumns]) {
    float all = x[0];
#pragma unroll
    for (int i = 1; i < kColumns; ++i) all += x[i];
#pragma unroll
    for (int other = 1; other < kLanes; other *= 2) all += __shfl_xor_sync(0xffffffffu, all, other);
    return all;
  }
};

// Pairs of 16-bit numbers in a register.
template <typename T>
struct Pairs {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  static __device__ __forceinline__ Pair pair(uint32_t x) { return *reinterpret_cast<const Pair*>(&x); }
  static __device__ __forceinline__ uint32_t bits(Pair x) { return *reinterpret_cast<const uint32_t*>(&x); }
  static __device__ __forceinline__ uint32_t both(T x) {
    Pair p;
    p.x = p.y = x;
    return bits(p);
  }
  static __device__ __forceinline__ uint32_t both(float x) { return both(from_float<T>(x)); }
  static __device__ __forceinline__ uint32_t both(T low, T high) {
    Pair p;
    p.x = low, p.y = high;
    return bits(p);
  }
  static __device__ __forceinline__ T low(uint32_t x) { return pair(x).x; }
  static __device__ __forceinline__ T high(uint32_t x) { return pair(x).y; }
  static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    return bits(__hfma2(pair(a), pair(b), pair(c)));
  }
  static __device__ __forceinline__ uint32_t mul(uint32_t a, uint32_t b) {
    return bits(__hmul2(pair(a), pair(b)));
  }
  static __device__ __forceinline__ uint4 fma(const uint4& a, uint32_t b, uint32_t c) {
    return {fma(a.x, b, c), fma(a.y, b, c), fma(a.z, b, c), fma(a.w, b, c)};
  }
  static __device__ __forceinline__ uint4 mul(const uint4& a, const uint4& b) {
    return {mul(a.x, b.x), mul(a.y, b.y), mul(a.z, b.z), mul(a.w, b.w)};
  }
};

// What a norm needs beside x, fetched and computed ahead of waiting: the gain of 8 inputs of tile i, 1 / this
// warp's inputs, and the inputs of the warps whose moments a lane reads.
template <typename T, int kColumns>
class NormConstants {
 public:
  struct Shared {};
  __device__ __forceinline__ NormConstants(const RowsCall& a, int warp, int lane, Shared&) {
    using Shares = NormShares<kColumns>;
    own_ = __fdividef(1.0f, static_cast<float>(max(a.columns_of(warp), 1)));
    asm volatile("" : "+f"(own_));  // here, and not where it is used
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      low_[i] = static_cast<float>(a.columns_of(Shares::first(lane) + i));
      high_[i] = static_cast<float>(a.columns_of(Shares::first(lane) + i + Shares::kApart));
      asm volatile("" : "+f"(low_[i]), "+f"(high_[i]));
    }
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      const int column = (warp + i * kWarps) * static_cast<int>(kTileColumns) + lane % 4 * 8;
      gain_[i] =
          column < a.in ? *reinterpret_cast<const uint4*>(static_cast<const T*>(a.gain) + column) : uint4{};
    }
  }
  __device__ __forceinline__ uint4 gain(int i) const { return gain_[i]; }
  __device__ __forceinline__ float own() const { return own_; }
  __device__ __forceinline__ float low(int i) const { return low_[i]; }
  __device__ __forceinline__ float high(int i) const { return high_[i]; }

 private:
  uint4 gain_[kWarpTiles];
  float own_, low_[kColumns], high_[kColumns];
};

// Up to 8 rows they stand in shared memory: for what is computed or kept in registers the assembler finds
// work behind the wait (0.162 instead of 0.169 ms for a row). With more rows shared memory is what a block
// waits for (32 rows 0.240 instead of 0.231).
template <typename T>
class NormConstants<T, 1> {
 public:
  struct Shared {
    uint4 gain[kSliceTiles * 4];  // of 8 inputs each
    float inputs[kWarps];         // of a warp
  };
  __device__ __forceinline__ NormConstants(const RowsCall& a, int warp, int lane, Shared& shared)
      : shared_(shared), tile_(warp * 4 + lane % 4), first_(NormShares<1>::first(lane)) {
    const int thread = static_cast<int>(threadIdx.x);
    static_assert(kSliceTiles * 4 <= kThreads);
    if (thread < kSliceTiles * 4)
      shared.gain[thread] = thread * 8 < a.in ? static_cast<const uint4*>(a.gain)[thread] : uint4{};
    if (thread < kWarps) shared.inputs[thread] = static_cast<float>(a.columns_of(thread));
    own_ = __fdividef(1.0f, static_cast<float>(max(a.columns_of(warp), 1)));
    asm volatile("" : "+f"(own_));  // here, and not where it is used
  }
  __device__ __forceinline__ uint4 gain(int i) const { return shared_.gain[tile_ + i * kWarps * 4]; }
  __device__ __forceinline__ float own() const { return own_; }
  __device__ __forceinline__ float low(int) const { return shared_.inputs[first_]; }
  __device__ __forceinline__ float high(int) const { return shared_.inputs[first_ + NormShares<1>::kApart]; }

 private:
  const Shared& shared_;
  int tile_, first_;
  float own_;
};

// What warps tell each other of a norm.
template <typename T, int kColumns>
struct NormShared {
  [[no_unique_address]] typename NormConstants<T, kColumns>::Shared constants;
  // No bank conflicts.
  float2 moments[kWarps][kColumns * 8 + 4];  // the mean of a warp's inputs and the squares around it
  float2 rows[kColumns * 8];                 // r / s and s mean - m
  // What a row's scale, and W gain and W shift of an output, make of a sum.
  __device__ __forceinline__ float normed(int row, float2 of_output, float sum) const {
    const float2 of_row = rows[row];
    return fmaf(of_row.x, fmaf(-of_row.y, of_output.x, sum), of_output.y);
  }
};

// One warp's share of it.
template <typename T, int kColumns, int kPanels>
class RowsNorm {
 public:
  using Shared = NormShared<T, kColumns>;
  using Product = WarpProduct<T, kColumns, kPanels, true>;

  // Ahead of waiting.
  __device__ __forceinline__ RowsNorm(const RowsCall& a, int warp, int lane, Shared& shared)
      : constants_(a, warp, lane, shared.constants) {}

  // x becomes (s x - m) gain. One barrier.
  __device__ __forceinline__ void operator()(const RowsCall& a, Product& product, int tiles, int warp,
                                             int lane, Shared& shared) const {
    share_moments(a, product, tiles, warp, lane, shared);
    __syncthreads();
    const uint32_t mine = combine(a, warp, lane, shared);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const uint32_t of_row = __shfl_sync(0xffffffffu, mine, (c * 8 + lane / 4) * Shares::kLanes);
      const uint32_t times = P::both(P::low(of_row)), minus = P::both(P::high(of_row));
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i)
        product.x[i][c] = P::mul(P::fma(product.x[i][c], times, minus), constants_.gain(i));
    }
  }

 private:
  using P = Pairs<T>;
  using Shares = NormShares<kColumns>;

  // The power of two next below r, as far as fp16 has it and the mean does not leave fp16 with it.
  static __device__ __forceinline__ uint32_t scale(float r, float mean) {
    constexpr uint32_t kOne = 127u << 23, kMost = 14u << 23;
    const auto power = [](float x) { return __float_as_uint(x) & (255u << 23); };
    const uint32_t most = min(kOne + kMost, 2 * kOne + kMost - power(mean));
    return max(min(power(r), most), kOne - kMost);
  }

  // Of this lane's row: s and -m in x's type.
  __device__ __forceinline__ uint32_t combine(const RowsCall& a, int warp, int lane, Shared& shared) const {
    const int row = Shares::row(lane), first = Shares::first(lane);
    float2 low[kColumns], high[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      low[i] = shared.moments[first + i][row];
      high[i] = shared.moments[first + i + Shares::kApart][row];
    }
    float sums[kColumns], squares[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      sums[i] = fmaf(constants_.high(i), high[i].x, __fmul_rn(constants_.low(i), low[i].x));
    const float mean = __fmul_rn(Shares::sum(sums), a.share);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const float d0 = low[i].x - mean, d1 = high[i].x - mean;
      squares[i] = fmaf(__fmul_rn(constants_.low(i), d0), d0, low[i].y) +
                   fmaf(__fmul_rn(constants_.high(i), d1), d1, high[i].y);
    }
    const float r = rsqrtf(fmaf(Shares::sum(squares), a.share, a.eps));
    const uint32_t s = scale(r, mean);
    const float scaled = __fmul_rn(mean, __uint_as_float(s));
    const T m = from_float<T>(scaled);
    const float inverse = __uint_as_float((254u << 23) - s);  // 1 / s
    if (warp == 0 && first == 0) shared.rows[row] = {__fmul_rn(r, inverse), scaled - to_float(m)};
    return P::both(from_float<T>(__uint_as_float(s)), from_float<T>(-to_float(m)));
  }

  __device__ __forceinline__ void share_moments(const RowsCall& a, const Product& product, int tiles,
                                                int warp, int lane, Shared& shared) const {
    // Halves of x - pivot: whatever x is, they are numbers.
    const uint32_t half = P::both(0.5f), ones = P::both(1.0f);
    float pivot[kColumns];
    uint32_t minus[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const uint32_t first = __shfl_sync(0xffffffffu, product.x[0][c].x, lane & ~3);
      pivot[c] = a.layer ? -0.5f * to_float(P::low(first)) : 0.0f;
      minus[c] = P::both(pivot[c]);
    }
    // Of a tile's first 16 inputs and of the others: two chains of products instead of a long one.
    float sums[2][4] = {}, squares[kColumns][2][4] = {};
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      uint4 d[2] = {};
      uint32_t within = i < tiles ? ~0u : 0;
      asm volatile("" : "+r"(within));  // no branches
#pragma unroll
      for (int c = 0; c < kColumns; ++c) d[c] = P::fma(product.x[i][c], half, minus[c] & within);
      const uint4 low{d[0].x, d[1].x, d[0].y, d[1].y}, high{d[0].z, d[1].z, d[0].w, d[1].w};
      matrix_multiply_add<T>(sums[0], low, ones, ones);
      matrix_multiply_add<T>(sums[1], high, ones, ones);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        matrix_multiply_add<T>(squares[c][0], low, d[c].x, d[c].y);
        matrix_multiply_add<T>(squares[c][1], high, d[c].z, d[c].w);
      }
    }
    // Of the squares the lane that has the diagonal's of its rows.
    const int row = lane / 4;
    if (lane % 4 != row / 2) return;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float sum = sums[0][c * 2] + sums[1][c * 2];
      const float even = squares[c][0][c * 2] + squares[c][1][c * 2];
      const float odd = squares[c][0][c * 2 + 1] + squares[c][1][c * 2 + 1];
      const float all = row % 2 == 0 ? even : odd, mean = __fmul_rn(sum, constants_.own());
      shared.moments[warp][c * 8 + row] =
          a.layer ? float2{2 * (mean - pivot[c]), 4 * fmaxf(fmaf(-sum, mean, all), 0.0f)}
                  : float2{0, 4 * all};
    }
  }

  NormConstants<T, kColumns> constants_;
};

}  // namespace kernels::cuda

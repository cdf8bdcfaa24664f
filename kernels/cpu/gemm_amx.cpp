#include "kernels/cpu/gemm_amx.h"

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "kernels/core/parallel.h"
#include "kernels/cpu/staging.h"

#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own AVX-512 header, _mm512_undefined_epi32
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,f16c,fma,amx-tile,amx-bf16,prfchw")

namespace kernels::cpu {

namespace {

constexpr int kTile = 16;                      // rows of a tile, and its columns in 32-bit words
constexpr int kDepth = 32;                     // k covered by one tile: 16 pairs
constexpr int kBlock = 2 * kTile;              // rows and columns of one block of c, four accumulators
constexpr int64_t kTileWords = kTile * kTile;  // 1 KiB
constexpr int64_t kPackedBytes = 8 << 20;      // of b packed at once: stays in the last-level cache
constexpr int64_t kPackedNear = 512 << 10;     // of a packed at once: stays near the core
constexpr int64_t kLongestSum = 4096;          // k of one pass into a 16-bit output
constexpr int64_t kPassSum = 512;  // k of one pass into an fp32 output, which accumulates over passes

// An operand seen as r (the index that survives: m of a, n of b) and k.
struct Source {
  const uint16_t* data;
  int64_t stride, r, k;
  bool k_contiguous;
};

Source source(const Operand& operand, bool is_a) {
  const Tensor& m = operand.matrix;
  const bool k_contiguous = is_a != operand.transposed;
  return {static_cast<const uint16_t*>(m.data), m.row_stride, k_contiguous ? m.rows() : m.cols(),
          k_contiguous ? m.cols() : m.rows(), k_contiguous};
}

template <typename T>
__m512 widen(__m256i raw) {
  if constexpr (std::is_same_v<T, f16>) return _mm512_cvtph_ps(raw);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// x to the nearest 8 significant bits, those of bf16 (Dekker's split); of an fp16 value at most 3 are left.
__m512 leading(__m512 x) {
  const __m512 c = _mm512_mul_ps(x, _mm512_set1_ps(0x1p16f + 1));
  return _mm512_sub_ps(c, _mm512_sub_ps(c, x));
}

// The upper halves of two vectors: a's in the even places and b's in the odd ones.
__m512i interleave_upper(__m512 a, __m512 b) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(_mm512_castps_si512(a), 16),
                                 _mm512_castps_si512(b));
}

// Transposes 16 x 16 words: words, pairs of words, then quarters.
void transpose(uint32_t* words) {
  __m512i* const row = reinterpret_cast<__m512i*>(words);
  __m512i a[kTile], b[kTile];
  for (int i = 0; i < kTile; i += 2) {
    const __m512i even = _mm512_load_si512(row + i), odd = _mm512_load_si512(row + i + 1);
    a[i] = _mm512_unpacklo_epi32(even, odd);
    a[i + 1] = _mm512_unpackhi_epi32(even, odd);
  }
  for (int i = 0; i < kTile; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
    }
  // b[4 g + c] holds, per 128-bit lane L, column 4 L + c of rows 4 g .. 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88),
                  high01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
    const __m512i low23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
    const __m512i high23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
    row[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    row[4 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    row[8 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    row[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}

// At an edge: the columns of the two vectors of line i along memory that lie inside the operand.
template <bool kContiguous>
struct Inside {
  int64_t rows, depth;  // of the tile
  __mmask16 first(int i) const { return mask(i < (kContiguous ? rows : depth), kContiguous ? depth : rows); }
  __mmask16 second(int i) const {
    return kContiguous ? mask(i < rows, depth - kTile) : mask(i + kTile < depth, rows);
  }
  static __mmask16 mask(bool any, int64_t count) {
    return any && count > 0 ? static_cast<__mmask16>((1u << std::min<int64_t>(count, kTile)) - 1) : 0;
  }
};

// Stores one vector of pairs and, for fp16, that of its remainders.
template <typename T>
inline void split(__m512 first, __m512 second, uint32_t* high, uint32_t* low) {
  if constexpr (std::is_same_v<T, f16>) {
    const __m512 a = leading(first), b = leading(second);
    _mm512_store_si512(high, interleave_upper(a, b));
    _mm512_store_si512(low, interleave_upper(_mm512_sub_ps(first, a), _mm512_sub_ps(second, b)));
  } else {
    _mm512_store_si512(high, interleave_upper(first, second));
  }
}

// One tile of 16 r and 32 k from (r0, k0), zero beyond the edges: its leading part and, for fp16, the
// remainder. Pair p is k = p and k = p + 16. for_a: row r holds the pairs; otherwise row p holds pair p of
// every r.
template <typename T, bool kContiguous>
void pack_tile(const Source& s, int64_t r0, int64_t k0, bool for_a, uint32_t* high, uint32_t* low) {
  const int64_t rows = std::min<int64_t>(kTile, s.r - r0), depth = std::min<int64_t>(kDepth, s.k - k0);
  const uint16_t* x = kContiguous ? s.data + r0 * s.stride + k0 : s.data + k0 * s.stride + r0;
  const int64_t second = kContiguous ? kTile : kTile * s.stride;
  if (rows == kTile && depth == kDepth) {
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i, x += s.stride)
      split<T>(widen<T>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))),
               widen<T>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + second))), high + i * kTile,
               low + i * kTile);
  } else {
    const Inside<kContiguous> inside{rows, depth};
    for (int i = 0; i < kTile; ++i, x += s.stride)
      split<T>(widen<T>(_mm256_maskz_loadu_epi16(inside.first(i), x)),
               widen<T>(_mm256_maskz_loadu_epi16(inside.second(i), x + second)), high + i * kTile,
               low + i * kTile);
  }
  if (kContiguous == for_a) return;
  transpose(high);
  if constexpr (std::is_same_v<T, f16>) transpose(low);
}

// How one operand is laid out when packed: for each 32 r and each 32 k the leading tiles of both halves, then
// the remainders.
template <typename T>
constexpr int64_t kStepWords = (std::is_same_v<T, f16> ? 4 : 2) * kTileWords;

template <typename T, bool kContiguous>
void pack_layout(const Source& s, int64_t r0, int64_t r1, int64_t k0, int64_t k1, bool for_a, uint32_t* out) {
  const int64_t blocks = (r1 - r0 + kBlock - 1) / kBlock, steps = (k1 - k0 + kDepth - 1) / kDepth;
  // Along memory: rows of k are walked together, so that a page is visited once.
  const int64_t outer = kContiguous ? blocks : steps, inner = kContiguous ? steps : blocks;
  for (int64_t i = 0; i < outer; ++i)
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t block = kContiguous ? i : j, step = kContiguous ? j : i;
      uint32_t* tiles = out + (block * steps + step) * kStepWords<T>;
      for (int64_t half = 0; half < 2; ++half, tiles += kTileWords)
        pack_tile<T, kContiguous>(s, std::min(r0 + block * kBlock + half * kTile, s.r), k0 + step * kDepth,
                                  for_a, tiles, tiles + 2 * kTileWords);
    }
}

template <typename T>
void pack(const Source& s, int64_t r0, int64_t r1, int64_t k0, int64_t k1, bool for_a, uint32_t* out) {
  return s.k_contiguous ? pack_layout<T, true>(s, r0, r1, k0, k1, for_a, out)
                        : pack_layout<T, false>(s, r0, r1, k0, k1, for_a, out);
}

// Tiles 0 to 3, the sums, += tiles 4 and 5, of a, times tiles 6 and 7, of b.
inline void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// sum (32, 32) = packed a (32, steps * 32) times packed b (steps * 32, 32).
template <typename T>
void multiply_block(const uint32_t* a, const uint32_t* b, int64_t steps, float* sum) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, a += kStepWords<T>, b += kStepWords<T>) {
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + kTileWords, 64);
    if constexpr (std::is_same_v<T, f16>) {
      _tile_loadd(6, b + 2 * kTileWords, 64);
      _tile_loadd(7, b + 3 * kTileWords, 64);
      multiply_tiles();
    }
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kTileWords, 64);
    multiply_tiles();
    if constexpr (std::is_same_v<T, f16>) {
      _tile_loadd(4, a + 2 * kTileWords, 64);
      _tile_loadd(5, a + 3 * kTileWords, 64);
      multiply_tiles();
    }
  }
  constexpr int kStride = kBlock * sizeof(float);
  _tile_stored(0, sum, kStride);
  _tile_stored(1, sum + kTile, kStride);
  _tile_stored(2, sum + kTile * kBlock, kStride);
  _tile_stored(3, sum + kTile * kBlock + kTile, kStride);
}

__m512 load_lanes(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
template <typename T>
__m512 load_lanes(const T* p, __mmask16 mask) {
  return widen<T>(_mm256_maskz_loadu_epi16(mask, p));
}
void store_lanes(float* p, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(p, mask, x); }
void store_lanes(f16* p, __mmask16 mask, __m512 x) {
  _mm256_mask_storeu_epi16(p, mask, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
void store_lanes(bf16* p, __mmask16 mask, __m512 x) {
  const __m512i u = _mm512_castps_si512(x), upper = _mm512_srli_epi32(u, 16);
  const __m512i tie =
      _mm512_add_epi32(_mm512_and_epi32(upper, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  const __m512i nearest = _mm512_srli_epi32(_mm512_add_epi32(u, tie), 16);
  const __m512i quiet = _mm512_or_epi32(upper, _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  _mm512_mask_cvtepi32_storeu_epi16(p, mask, _mm512_mask_blend_epi32(nan, nearest, quiet));
}

// c[m0.., n0..] = sum + bias, or += sum; only what lies inside c.
template <typename T, typename C>
void store_block(const float* sum, const Tensor& bias, bool accumulate, const Tensor& c, int64_t m0,
                 int64_t n0) {
  const int64_t rows = std::min<int64_t>(kBlock, c.rows() - m0),
                cols = std::min<int64_t>(kBlock, c.cols() - n0);
  const uint32_t lanes = cols == kBlock ? ~0u : (1u << cols) - 1;
  for (int half = 0; half < 2; ++half) {
    const __mmask16 mask = static_cast<__mmask16>(lanes >> (half * kTile));
    C* out = static_cast<C*>(c.data) + m0 * c.row_stride + n0 + half * kTile;
    const float* line = sum + half * kTile;
    __m512 addend = _mm512_setzero_ps();
    if (bias && !accumulate) addend = load_lanes(static_cast<const T*>(bias.data) + n0 + half * kTile, mask);
    for (int64_t i = 0; i < rows; ++i, out += c.row_stride, line += kBlock) {
      if (accumulate) addend = load_lanes(out, mask);
      store_lanes(out, mask, _mm512_add_ps(addend, _mm512_load_ps(line)));
    }
  }
}

// Fetches the block of c that store_block will write, while its sum is computed. Inlined by force: GCC takes
// a function that only prefetches for one without effect.
template <typename C>
[[gnu::always_inline]] inline void fetch_block(const Tensor& c, int64_t m0, int64_t n0) {
  const int64_t rows = std::min<int64_t>(kBlock, c.rows() - m0);
  const C* line = static_cast<const C*>(c.data) + m0 * c.row_stride + n0;
  for (int64_t i = 0; i < rows; ++i, line += c.row_stride) {
    __builtin_prefetch(line, 1);
    if constexpr (sizeof(C) == 4) __builtin_prefetch(line + kTile, 1);
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The part of c in rows [m0, m1) and columns [n0, n1), sums over [k0, k1).
template <typename T, typename C>
void multiply_part(const Source& a, const Source& b, const Tensor& bias, bool accumulate, const Tensor& c,
                   int64_t m0, int64_t m1, int64_t n0, int64_t n1, int64_t k0, int64_t k1) {
  thread_local Staging<uint32_t> a_memory, b_memory;
  const int64_t steps = (k1 - k0 + kDepth - 1) / kDepth, panel = steps * kStepWords<T>;
  const int64_t panels = std::max<int64_t>(1, kPackedBytes / (panel * 4));
  const int64_t rows = std::max<int64_t>(1, kPackedNear / (panel * 4)) * kBlock;
  alignas(64) float sum[kBlock * kBlock];
  for (int64_t nb = n0; nb < n1; nb += panels * kBlock) {
    const int64_t ne = std::min(nb + panels * kBlock, n1);
    uint32_t* packed_b = b_memory.get((ne - nb + kBlock - 1) / kBlock * panel);
    pack<T>(b, nb, ne, k0, k1, false, packed_b);
    for (int64_t mb = m0; mb < m1; mb += rows) {
      const int64_t me = std::min(mb + rows, m1);
      uint32_t* packed_a = a_memory.get(rows / kBlock * panel);
      pack<T>(a, mb, me, k0, k1, true, packed_a);
      for (int64_t n = nb; n < ne; n += kBlock)
        for (int64_t m = mb; m < me; m += kBlock) {
          fetch_block<C>(c, m, n);
          multiply_block<T>(packed_a + (m - mb) / kBlock * panel, packed_b + (n - nb) / kBlock * panel, steps,
                            sum);
          store_block<T, C>(sum, bias, accumulate, c, m, n);
        }
    }
  }
}

template <typename T, typename C>
void multiply(const Operand& a, const Operand& b, const Tensor& bias, bool accumulate, const Tensor& c) {
  const Source sa = source(a, true), sb = source(b, false);
  constexpr int64_t pass = std::is_same_v<C, float> ? kPassSum : kLongestSum;
  // Threads share the longer side of c, in whole blocks: no sum is ever split between them.
  const bool by_rows = c.rows() >= c.cols();
  parallel_for(by_rows ? c.rows() : c.cols(), kBlock, [&](int64_t begin, int64_t end) {
    static const TileConfig config;
    _tile_loadconfig(&config);
    for (int64_t k = 0; k < sa.k; k += pass)
      multiply_part<T, C>(sa, sb, bias, accumulate || k > 0, c, by_rows ? begin : 0, by_rows ? end : c.rows(),
                          by_rows ? 0 : begin, by_rows ? c.cols() : end, k, std::min(k + pass, sa.k));
    _tile_release();
  });
}

bool request_amx() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return false;
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if ((edx & kBf16) == 0 || (edx & kTiles) == 0) return false;
  // Linux hands out the tile registers on request (arch_prctl ARCH_REQ_XCOMP_PERM for XTILEDATA).
  constexpr int kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

bool amx_usable() {
  static const bool usable = request_amx();
  return usable;
}

bool amx_suits(const Operand& a, const Operand& b, const Tensor& c) {
  const DType t = a.matrix.dtype;
  if ((t != DType::f16 && t != DType::bf16) || (c.dtype != DType::f32 && a.cols() > kLongestSum))
    return false;
  return std::min({a.rows(), a.cols(), b.cols()}) >= kTile && amx_usable();
}

void gemm_amx(const Operand& a, const Operand& b, const Tensor& bias, bool accumulate, const Tensor& c) {
  const bool half = a.matrix.dtype == DType::f16;
  if (c.dtype == DType::f32) {
    half ? multiply<f16, float>(a, b, bias, accumulate, c) : multiply<bf16, float>(a, b, bias, accumulate, c);
  } else {
    half ? multiply<f16, f16>(a, b, bias, accumulate, c) : multiply<bf16, bf16>(a, b, bias, accumulate, c);
  }
}

}  // namespace kernels::cpu

#pragma GCC pop_options

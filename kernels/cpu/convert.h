#pragma once
// Rows of numbers to and from the type that sums are held in, with the vector instructions every supported
// machine has. Rounding is to nearest, ties to even, as in dtype.h.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/core/dtype.h"

namespace kernels::cpu {

inline void load_row(const double* x, double* y, int64_t n) { std::memcpy(y, x, n * sizeof(double)); }
inline void load_row(const float* x, float* y, int64_t n) { std::memcpy(y, x, n * sizeof(float)); }
inline void load_row(const f16* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  for (; i < n; ++i) y[i] = x[i];
}
inline void load_row(const bf16* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)));
    _mm256_storeu_ps(y + i, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
  }
  for (; i < n; ++i) y[i] = x[i];
}

inline void store_row(const double* x, double* y, int64_t n) { std::memcpy(y, x, n * sizeof(double)); }
inline void store_row(const float* x, float* y, int64_t n) { std::memcpy(y, x, n * sizeof(float)); }
inline void store_row(const float* x, f16* y, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) y[i] = f16(x[i]);
}
inline void store_row(const float* x, bf16* y, int64_t n) {
  int64_t i = 0;
  const __m256i one = _mm256_set1_epi32(1), half = _mm256_set1_epi32(0x7fff), quiet = _mm256_set1_epi32(0x40);
  for (; i + 8 <= n; i += 8) {
    const __m256 value = _mm256_loadu_ps(x + i);
    const __m256i u = _mm256_castps_si256(value), upper = _mm256_srli_epi32(u, 16);
    const __m256i tie = _mm256_add_epi32(half, _mm256_and_si256(upper, one));
    const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(u, tie), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i bits = _mm256_blendv_epi8(nearest, _mm256_or_si256(upper, quiet), nan);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i),
                     _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
  }
  for (; i < n; ++i) y[i] = bf16(x[i]);
}

}  // namespace kernels::cpu

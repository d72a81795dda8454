// Stands before the compiler's <immintrin.h> when kernels of an instruction set that this machine may lack are compiled for
// a test: AVX-512 as SIMDe (https://github.com/simd-everywhere/simde) computes it on plain vectors, and by hand what its
// release 0.7 does not have. A 512-bit vector is GCC's own type, as it is beside the real instructions.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include_next <immintrin.h>
#include "tiles.h"
#include <math.h>
#include <simde/x86/avx512.h>
#include <stdint.h>
#include <string.h>

namespace emulated {

// Elements whose bit of `mask` is set, zeros for the others, whose memory is not touched.
template <class Vector, class Element>
inline Vector load_masked(uint64_t mask, const void* from) {
  Element out[sizeof(Vector) / sizeof(Element)];
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(Element); ++i) {
    out[i] = 0;
    if (mask >> i & 1) memcpy(out + i, (const char*)from + i * sizeof(Element), sizeof(Element));
  }
  Vector v;
  memcpy(&v, out, sizeof v);
  return v;
}

// out[i] = f(in[i]) for as many elements as the longer of the two vectors has.
template <class To, class ToElement, class From, class FromElement, class F>
inline To each(From v, F f) {
  FromElement in[sizeof(From) / sizeof(FromElement)];
  ToElement out[sizeof(To) / sizeof(ToElement)];
  static_assert(sizeof in / sizeof *in == sizeof out / sizeof *out, "one element becomes one element");
  memcpy(in, &v, sizeof in);
  for (unsigned i = 0; i < sizeof in / sizeof *in; ++i) out[i] = f(in[i]);
  To to;
  memcpy(&to, out, sizeof to);
  return to;
}

// To the nearest bf16, even where two are as near; denormals count as zero, a NaN is made quiet.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return (uint16_t)(bits >> 16 | 0x40);
  if ((bits & 0x7f800000) == 0) return (uint16_t)(bits >> 16 & 0x8000);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline __m512 half_to_float(__m256i v) {
  __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(v)), high = _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1));
  __m512 to;
  memcpy(&to, &low, 32);
  memcpy((char*)&to + 32, &high, 32);
  return to;
}
template <int Rounding>
inline __m256i float_to_half(__m512 v) {
  __m256 half[2];
  memcpy(half, &v, 64);
  return _mm256_set_m128i(_mm256_cvtps_ph(half[1], Rounding & ~_MM_FROUND_NO_EXC),
                          _mm256_cvtps_ph(half[0], Rounding & ~_MM_FROUND_NO_EXC));
}
inline float reduce(__m512 v, float (*f)(float, float)) {  // halves meet halves, as the compilers' sequences do
  float lanes[16];
  memcpy(lanes, &v, 64);
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] = f(lanes[i], lanes[i + n]);
  return lanes[0];
}

}  // namespace emulated

#undef _mm512_madd_epi16  // takes four arguments in SIMDe 0.7
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, which) simde_mm512_shuffle_f32x4(a, b, which)
#define _mm512_maskz_loadu_ps(mask, from) emulated::load_masked<__m512, float>(mask, from)
#define _mm512_maskz_loadu_epi16(mask, from) emulated::load_masked<__m512i, uint16_t>(mask, from)
#define _mm256_maskz_loadu_epi16(mask, from) emulated::load_masked<__m256i, uint16_t>(mask, from)
#define _mm512_cvtepu16_epi32(v) \
  emulated::each<__m512i, int32_t, __m256i, uint16_t>(v, [](uint16_t x) { return (int32_t)x; })
#define _mm512_cvtepi8_epi32(v) \
  emulated::each<__m512i, int32_t, __m128i, int8_t>(v, [](int8_t x) { return (int32_t)x; })
#define _mm512_cvtepi32_epi16(v) \
  emulated::each<__m256i, int16_t, __m512i, int32_t>(v, [](int32_t x) { return (int16_t)x; })
#define _mm512_cvtepi32_ps(v) emulated::each<__m512, float, __m512i, int32_t>(v, [](int32_t x) { return (float)x; })
#define _mm512_cvtps_epi32(v)                                      \
  emulated::each<__m512i, int32_t, __m512, float>(v, [](float x) { \
    return x >= -2147483648.0f && x < 2147483648.0f ? (int32_t)nearbyintf(x) : INT32_MIN; \
  })
#define _mm512_cvtneps_pbh(v) emulated::each<__m256i, uint16_t, __m512, float>(v, emulated::to_bf16)
#define _mm512_cvtph_ps(v) emulated::half_to_float(v)
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(v, rounding) emulated::float_to_half<rounding>(v)
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(v, half) _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), half))
#define _mm512_reduce_add_ps(v) emulated::reduce(v, [](float a, float b) { return a + b; })
#define _mm512_reduce_max_ps(v) emulated::reduce(v, [](float a, float b) { return a > b ? a : b; })

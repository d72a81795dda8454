// Vectors of AVX-512: 16 floats; with QWEN15_BF16_PAIRS bf16 dot products, with QWEN15_VNNI those of 16-bit integers.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int W = 16;  // floats per vector
constexpr int kTileRows = 6, kTileVecs = 4;  // 24 of 32 registers accumulate
constexpr int kDotTokens = 12;                 // times 2 rows: 24 as well
constexpr int64_t kPanelDepth = 1024;          // inputs of a packed panel: 64 of 2 bytes stay in L2
typedef __m512 V;

inline V v_zero() { return _mm512_setzero_ps(); }
inline V v_set(float x) { return _mm512_set1_ps(x); }
inline V v_load(const float* p) { return _mm512_loadu_ps(p); }
inline void v_store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V v_add(V a, V b) { return _mm512_add_ps(a, b); }
inline V v_sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V v_mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V v_div(V a, V b) { return _mm512_div_ps(a, b); }
inline V v_fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V v_mac(V acc, V a, V b) { return v_fma(a, b, acc); }
inline V v_max(V a, V b) { return _mm512_max_ps(a, b); }
inline V v_min(V a, V b) { return _mm512_min_ps(a, b); }
inline float v_sum(V v) { return _mm512_reduce_add_ps(v); }
// out[i] = sum of v_i
inline void v_sum4(V v0, V v1, V v2, V v3, float* out) {
  V a = _mm512_add_ps(_mm512_unpacklo_ps(v0, v1), _mm512_unpackhi_ps(v0, v1));
  V b = _mm512_add_ps(_mm512_unpacklo_ps(v2, v3), _mm512_unpackhi_ps(v2, v3));
  __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
  __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
  V lanes = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
inline float v_highest(V v) { return _mm512_reduce_max_ps(v); }
inline V v_round(V v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// v * 2^n, n a whole number
inline V v_scale2(V v, V n) { return _mm512_scalef_ps(v, n); }

// v where x >= low, 0 elsewhere
inline V v_keep_from(V x, V low, V v) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, low, _CMP_GE_OQ), v); }
inline bool v_any_nan(V v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }

inline V v_load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline V v_load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void v_store_f16(uint16_t* p, V v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void v_store_bf16(uint16_t* p, V v) {
#ifdef QWEN15_BF16_PAIRS
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
#else
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet)));
#endif
}

// First n of a vector's elements, zeros after them; memory beyond is not touched.
inline V v_load_part(const float* p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
inline V v_load_part_bf16(const uint16_t* p, int n) {
  __m256i v = _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
inline V v_load_part_f16(const uint16_t* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
}

#define QWEN15_LOAD_REST 1
// A vector's elements from the nth on, zeros before them; memory there is not touched.
inline V v_load_rest(const float* p, int n) { return _mm512_maskz_loadu_ps((__mmask16)(0xffffu << n), p); }
inline V v_load_rest_bf16(const uint16_t* p, int n) {
  __m256i v = _mm256_maskz_loadu_epi16((__mmask16)(0xffffu << n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
inline V v_load_rest_f16(const uint16_t* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)(0xffffu << n), p));
}

// 2 W bf16: the even ones to v[0], the odd ones to v[1]; and back into their order.
inline void v_split_bf16(__m512i x, V* v) {
  v[0] = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  v[1] = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)));
}
inline void v_load_bf16_pair(const uint16_t* p, V* v) { v_split_bf16(_mm512_loadu_si512(p), v); }
inline void v_load_part_bf16_pair(const uint16_t* p, int n, V* v) {
  v_split_bf16(_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p), v);
}
inline void v_interleave(V* v) {
  __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  V low = _mm512_permutex2var_ps(v[0], first, v[1]);
  v[1] = _mm512_permutex2var_ps(v[0], _mm512_add_epi32(first, _mm512_set1_epi32(8)), v[1]);
  v[0] = low;
}

#define QWEN15_REPEAT 1
// The G dwords at p (1, 2, 4 or 8), as often as they fit.
template <int G>
inline V v_repeat(const void* p) {
  static_assert(G == 1 || G == 2 || G == 4 || G == 8, "what can be broadcast");
  if (G == 1) return _mm512_castsi512_ps(_mm512_set1_epi32(*(const int32_t __attribute__((may_alias, aligned(1)))*)p));
  if (G == 2) return _mm512_castsi512_ps(_mm512_set1_epi64(*(const int64_t __attribute__((may_alias, aligned(1)))*)p));
  if (G == 4) return _mm512_castsi512_ps(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)));
  return _mm512_castsi512_ps(_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p)));
}

// Integers: I, W of 32 bits, and S, 2 W of 16 bits.
typedef __m512i I;
typedef __m512i S;

inline I i_zero() { return _mm512_setzero_si512(); }
inline V i_float(I x) { return _mm512_cvtepi32_ps(x); }
inline S s_load(const void* p) { return _mm512_loadu_si512(p); }
inline S s_load_bytes(const void* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }  // 2 W int8
inline S s_nibble(S v, int k) {  // bits 4k to 4k + 3 of each
  if (k == 3) return _mm512_srli_epi16(v, 12);
  return _mm512_and_si512(k == 0 ? v : _mm512_srli_epi16(v, 4 * k), _mm512_set1_epi16(15));
}
#ifdef QWEN15_VNNI
inline S s_set(int16_t x) { return _mm512_set1_epi16(x); }
inline S s_sub(S a, S b) { return _mm512_sub_epi16(a, b); }
inline V s_floats(S x) { return _mm512_castsi512_ps(x); }  // the same bits
inline S s_load_nibbles(const uint8_t* block) {  // the 2 W columns of a block of 4-bit ones
  const __m512i shifts = _mm512_setr_epi64(0, 0, 0x0004000400040004, 0x0004000400040004, 0x0008000800080008,
                                           0x0008000800080008, 0x000c000c000c000c, 0x000c000c000c000c);
  __m512i words = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)block));
  return _mm512_and_si512(_mm512_srlv_epi16(words, shifts), _mm512_set1_epi16(15));
}
inline S s_repeat(const int16_t* p) {  // the pair at p, in every lane
  int32_t pair;
  memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}
#endif
// acc + products of a and b, those of neighbours in one lane
inline I i_madd(I acc, S a, S b) {
#ifdef QWEN15_VNNI
  return _mm512_dpwssd_epi32(acc, a, b);
#else
  return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
#endif
}
// Sums of the lanes of each 128 bits, as floats: lanes of a and b in turn, each a sum of two; and the four whole sums.
inline I i_paired(I a, I b) { return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); }
inline V i_pair(I a, I b) { return i_float(i_paired(a, b)); }
inline V i_quad(I a, I b, I c, I d) {
  I first = i_paired(a, b), second = i_paired(c, d);
  return i_float(_mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second)));
}
// out (4,) = the sum of v's 128 bits
inline void v_quarters(V v, float* out) {
  V halves = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4e));
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_add_ps(halves, _mm512_shuffle_f32x4(halves, halves, 0xb1))));
}
// Whole numbers a and b as 2 W int16 to p; total + a + b
inline I s_store(int16_t* p, V a, V b, I total) {
  I x = _mm512_cvtps_epi32(a), y = _mm512_cvtps_epi32(b);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(x));
  _mm256_storeu_si256((__m256i*)(p + W), _mm512_cvtsepi32_epi16(y));
  return _mm512_add_epi32(total, _mm512_add_epi32(x, y));
}
// The Count floats at p (1, 2 or 4), each in its part of the lanes.
template <int Count>
inline V v_spread(const float* p) {
  static_assert(Count == 1 || Count == 2 || Count == 4, "what can be spread");
  if (Count == 1) return v_set(*p);
  const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m512i fourths = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  V few = _mm512_castps128_ps512(Count == 2 ? _mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)p)) : _mm_loadu_ps(p));
  return _mm512_permutexvar_ps(Count == 2 ? halves : fourths, few);
}
inline V v_load_bytes(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
// Columns [column, column + W) of a block of 4-bit ones
inline V v_load_nibbles(const uint8_t* block, int column) {
  __m256i half = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)block));
  __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
  __m512i shift = column == 0 ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4)
                              : _mm512_setr_epi32(8, 8, 8, 8, 8, 8, 8, 8, 12, 12, 12, 12, 12, 12, 12, 12);
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srlv_epi32(words, shift), _mm512_set1_epi32(15)));
}

// 16 vectors of 16 dwords, transposed in place.
inline void v_transpose(V r[W]) {
  V t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}

// 4 vectors of 4 units of 128 bits, transposed in place.
inline void v_transpose_quarters(V& a, V& b, V& c, V& d) {
  V t0 = _mm512_shuffle_f32x4(a, b, 0x44), t1 = _mm512_shuffle_f32x4(c, d, 0x44);
  V t2 = _mm512_shuffle_f32x4(a, b, 0xee), t3 = _mm512_shuffle_f32x4(c, d, 0xee);
  a = _mm512_shuffle_f32x4(t0, t1, 0x88);
  b = _mm512_shuffle_f32x4(t0, t1, 0xdd);
  c = _mm512_shuffle_f32x4(t2, t3, 0x88);
  d = _mm512_shuffle_f32x4(t2, t3, 0xdd);
}
// 16 / G vectors of 16 / G units of G dwords (1, 2, 4 or 8), transposed in place.
template <int G>
inline void v_transpose_units(V* r) {
  static_assert(G == 1 || G == 2 || G == 4 || G == 8, "what can be transposed");
  if (G == 8) {
    V first = _mm512_shuffle_f32x4(r[0], r[1], 0x44);
    r[1] = _mm512_shuffle_f32x4(r[0], r[1], 0xee);
    r[0] = first;
    return;
  }
  if (G == 1) return v_transpose(r);
  if (G == 4) return v_transpose_quarters(r[0], r[1], r[2], r[3]);
  V even[4], odd[4];  // units 0, 2, 4, 6 and 1, 3, 5, 7 of two vectors each
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512d a = _mm512_castps_pd(r[2 * i]), b = _mm512_castps_pd(r[2 * i + 1]);
    even[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    odd[i] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  v_transpose_quarters(even[0], even[1], even[2], even[3]);
  v_transpose_quarters(odd[0], odd[1], odd[2], odd[3]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[2 * i] = even[i];
    r[2 * i + 1] = odd[i];
  }
}

#ifdef QWEN15_BF16_PAIRS
typedef __m512i B;  // 2 W bf16
inline B b_load(const void* p) { return _mm512_loadu_si512(p); }
inline B b_load_part(const uint16_t* p, int n) {  // n in [0, 32]
  return _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
}
inline B b_load_rest(const uint16_t* p, int n) { return _mm512_maskz_loadu_epi16(~0u << n, p); }  // n in [0, 32)
inline B b_repeat(const uint16_t* p) {  // the pair at p, in every lane
  int32_t pair;
  memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}
inline V b_floats(B x) { return _mm512_castsi512_ps(x); }  // the same bits
inline B b_bits(V x) { return _mm512_castps_si512(x); }
// bf16 stored as the upper halves of floats -> pairs of an even and an odd one
inline B b_join(V even, V odd) {
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), _mm512_castps_si512(odd));
}
// Two bf16 per dword: acc[i] += a[2i] b[2i] + a[2i + 1] b[2i + 1]
inline V v_dot_pairs(V acc, B a, B b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
#endif

}  // namespace

// Vectors of AVX2 with FMA and F16C: 8 floats.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int W = 8;
constexpr int kTileRows = 4, kTileVecs = 3;  // 12 of 16 registers accumulate
constexpr int kDotTokens = 6;                  // times 2 rows: 12 as well
constexpr int64_t kPanelDepth = 256;           // inputs of a packed panel: 24 of 4 bytes stay in the first cache level
typedef __m256 V;

inline V v_zero() { return _mm256_setzero_ps(); }
inline V v_set(float x) { return _mm256_set1_ps(x); }
inline V v_load(const float* p) { return _mm256_loadu_ps(p); }
inline void v_store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V v_add(V a, V b) { return _mm256_add_ps(a, b); }
inline V v_sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V v_mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V v_div(V a, V b) { return _mm256_div_ps(a, b); }
inline V v_fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
// acc + a b. Left to itself GCC moves the sums of a loop from register to register, and some to memory: a third of the time.
inline V v_mac(V acc, V a, V b) {
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
  return acc;
}
inline V v_max(V a, V b) { return _mm256_max_ps(a, b); }
inline V v_min(V a, V b) { return _mm256_min_ps(a, b); }
inline float v_sum(V v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// out[i] = sum of v_i
inline void v_sum4(V v0, V v1, V v2, V v3, float* out) {
  V lanes = _mm256_hadd_ps(_mm256_hadd_ps(v0, v1), _mm256_hadd_ps(v2, v3));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1)));
}
inline float v_highest(V v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline V v_round(V v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V v_scale2(V v, V n) {  // n in [-126, 127]
  __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(v, _mm256_castsi256_ps(exponent));
}

// v where x >= low, 0 elsewhere
inline V v_keep_from(V x, V low, V v) { return _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_GE_OQ), v); }
inline bool v_any_nan(V v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0; }

inline V v_load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline V v_load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void v_store_f16(uint16_t* p, V v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void v_store_bf16(uint16_t* p, V v) {
  __m256i bits = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}

inline V v_load_part(const float* p, int n) {
  if (n == W) return v_load(p);
  float whole[W] = {0};
  memcpy(whole, p, n * sizeof(float));
  return v_load(whole);
}
inline V v_load_part_bf16(const uint16_t* p, int n) {
  uint16_t whole[W] = {0};
  memcpy(whole, p, n * sizeof(uint16_t));
  return v_load_bf16(whole);
}
inline V v_load_part_f16(const uint16_t* p, int n) {
  uint16_t whole[W] = {0};
  memcpy(whole, p, n * sizeof(uint16_t));
  return v_load_f16(whole);
}

// W pairs of bf16, and of each the first and the second one: of 2 W in order the even ones and the odd ones.
#define QWEN15_SPLIT 1
inline V v_load_pairs(const uint16_t* p) { return _mm256_loadu_ps((const float*)p); }
inline V v_load_part_pairs(const uint16_t* p, int n) {
  uint16_t whole[2 * W] = {0};
  memcpy(whole, p, n * sizeof(uint16_t));
  return v_load_pairs(whole);
}
inline V v_even_bf16(V pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16)); }
inline V v_odd_bf16(V pairs) { return _mm256_and_ps(pairs, _mm256_castsi256_ps(_mm256_set1_epi32((int)0xffff0000))); }
// 2 W bf16: the even ones to v[0], the odd ones to v[1]; and back into their order.
inline void v_load_bf16_pair(const uint16_t* p, V* v) {
  V pairs = v_load_pairs(p);
  v[0] = v_even_bf16(pairs);
  v[1] = v_odd_bf16(pairs);
}
inline void v_load_part_bf16_pair(const uint16_t* p, int n, V* v) {
  V pairs = v_load_part_pairs(p, n);
  v[0] = v_even_bf16(pairs);
  v[1] = v_odd_bf16(pairs);
}
// 2 W floats in order: the even ones to v[0], the odd ones to v[1].
inline void v_split(V* v) {
  __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(v[0], v[1], 0x88));
  __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(v[0], v[1], 0xdd));
  v[0] = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8));
  v[1] = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8));
}
inline void v_interleave(V* v) {
  V low = _mm256_unpacklo_ps(v[0], v[1]), high = _mm256_unpackhi_ps(v[0], v[1]);
  v[0] = _mm256_permute2f128_ps(low, high, 0x20);
  v[1] = _mm256_permute2f128_ps(low, high, 0x31);
}

// Integers: I, W of 32 bits, and S, 2 W of 16 bits.
typedef __m256i I;
typedef __m256i S;

inline I i_zero() { return _mm256_setzero_si256(); }
inline V i_float(I x) { return _mm256_cvtepi32_ps(x); }
inline S s_load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline S s_load_bytes(const void* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }  // 2 W int8
inline S s_nibble(S v, int k) {  // bits 4k to 4k + 3 of each
  if (k == 3) return _mm256_srli_epi16(v, 12);
  return _mm256_and_si256(k == 0 ? v : _mm256_srli_epi16(v, 4 * k), _mm256_set1_epi16(15));
}
// acc + products of a and b, those of neighbours in one lane. Sums of integers may be taken in any order, and GCC makes
// use of it: it computes all products of a segment first and keeps them in memory, a store and a load for each. The
// empty statement says that each sum is needed at once.
inline I i_madd(I acc, S a, S b) {
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
  __asm__("" : "+x"(acc));
  return acc;
}
// Sums of the lanes of each 128 bits, as floats: lanes of a and b in turn, each a sum of two; and the four whole sums.
inline I i_paired(I a, I b) { return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)); }
inline V i_pair(I a, I b) { return i_float(i_paired(a, b)); }
inline V i_quad(I a, I b, I c, I d) {
  I first = i_paired(a, b), second = i_paired(c, d);
  return i_float(_mm256_add_epi32(_mm256_unpacklo_epi64(first, second), _mm256_unpackhi_epi64(first, second)));
}
// out (4,) = the sum of v's 128 bits
inline void v_quarters(V v, float* out) {
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
}
// Whole numbers a and b as 2 W int16 to p; total + a + b
inline I s_store(int16_t* p, V a, V b, I total) {
  I x = _mm256_cvtps_epi32(a), y = _mm256_cvtps_epi32(b);
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packs_epi32(x, y), 0xd8));
  return _mm256_add_epi32(total, _mm256_add_epi32(x, y));
}
// The Count floats at p (1 or 2), each in its part of the lanes.
template <int Count>
inline V v_spread(const float* p) {
  static_assert(Count == 1 || Count == 2, "what can be spread");
  if (Count == 1) return v_set(*p);
  return _mm256_set_m128(_mm_broadcast_ss(p + 1), _mm_broadcast_ss(p));
}
inline V v_load_bytes(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
// Columns [column, column + W) of a block of 4-bit ones
inline V v_load_nibbles(const uint8_t* block, int column) {
  __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)block));
  return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(words, column / 2), _mm256_set1_epi32(15)));
}

inline void v_transpose(V r[W]) {
  V t[W];
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < W; ++i) r[i] = t[i];
}

}  // namespace

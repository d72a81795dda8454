// Vectors of ARM's NEON: 4 floats; with QWEN15_BF16_PAIRS bf16 dot products, with QWEN15_DOT_BYTES those of bytes.
#pragma once
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int W = 4;
constexpr int kTileRows = 6, kTileVecs = 4;  // 24 of 32 registers accumulate
constexpr int kDotTokens = 12;                 // times 2 rows: 24 as well
constexpr int64_t kPanelDepth = 1024;          // inputs of a packed panel: 16 of 4 bytes stay in L2
typedef float32x4_t V;

// Memory of any type; a pointer to float would promise the compiler that it holds floats.
template <class To>
inline To v_any(const void* p) {
  To v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline V v_zero() { return vdupq_n_f32(0); }
inline V v_set(float x) { return vdupq_n_f32(x); }
inline V v_load(const float* p) { return v_any<V>(p); }
inline void v_store(float* p, V v) { memcpy(p, &v, sizeof v); }
inline V v_add(V a, V b) { return vaddq_f32(a, b); }
inline V v_sub(V a, V b) { return vsubq_f32(a, b); }
inline V v_mul(V a, V b) { return vmulq_f32(a, b); }
inline V v_div(V a, V b) { return vdivq_f32(a, b); }
inline V v_fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline V v_mac(V acc, V a, V b) { return v_fma(a, b, acc); }
// b where one of them is no number, as on other CPUs
inline V v_max(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline V v_min(V a, V b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline float v_sum(V v) { return vaddvq_f32(v); }
// out[i] = sum of v_i
inline void v_sum4(V v0, V v1, V v2, V v3, float* out) {
  v_store(out, vpaddq_f32(vpaddq_f32(v0, v1), vpaddq_f32(v2, v3)));
}
inline float v_highest(V v) {
  float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
inline V v_round(V v) { return vrndnq_f32(v); }
inline V v_scale2(V v, V n) {  // n at most 127; 0 below -126
  int32x4_t exponent = vmaxq_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), vdupq_n_s32(0));
  return vmulq_f32(v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
}

// v where x >= low, 0 elsewhere
inline V v_keep_from(V x, V low, V v) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vcgeq_f32(x, low)));
}
inline bool v_any_nan(V v) { return vminvq_u32(vceqq_f32(v, v)) == 0; }

inline V v_load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(v_any<uint16x4_t>(p), 16)); }
inline V v_load_f16(const uint16_t* p) { return vcvt_f32_f16(v_any<float16x4_t>(p)); }
inline void v_store_f16(uint16_t* p, V v) {
  float16x4_t half = vcvt_f16_f32(v);
  memcpy(p, &half, sizeof half);
}
inline void v_store_bf16(uint16_t* p, V v) {
#ifdef QWEN15_BF16_PAIRS
  bfloat16x4_t words = vcvt_bf16_f32(v);
#else
  uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  uint16x4_t words = vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
#endif
  memcpy(p, &words, sizeof words);
}

// First n of a vector's elements, zeros after them; memory beyond is not touched.
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

// 2 W bf16: the even ones to v[0], the odd ones to v[1]; and back into their order.
inline void v_load_bf16_pair(const uint16_t* p, V* v) {
  uint32x4_t x = v_any<uint32x4_t>(p);
  v[0] = vreinterpretq_f32_u32(vshlq_n_u32(x, 16));
  v[1] = vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u)));
}
inline void v_load_part_bf16_pair(const uint16_t* p, int n, V* v) {
  uint16_t whole[2 * W] = {0};
  memcpy(whole, p, n * sizeof(uint16_t));
  v_load_bf16_pair(whole, v);
}
inline void v_interleave(V* v) {
  V low = vzip1q_f32(v[0], v[1]);
  v[1] = vzip2q_f32(v[0], v[1]);
  v[0] = low;
}

// Integers: S, 2 W of 16 bits, and I, W of 32 bits.
typedef int16x8_t S;
#ifdef QWEN15_DOT_BYTES
// The sums of products with the upper bytes of activations and with their lower ones.
struct I {
  int32x4_t upper, lower;
};
inline I i_zero() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
inline int32x4_t i_whole(I x) { return vaddq_s32(vshlq_n_s32(x.upper, 8), x.lower); }
inline I i_add(I a, int32x4_t b) { return {a.upper, vaddq_s32(a.lower, b)}; }
// acc + products of 16 bytes w and the 16 upper and 16 lower bytes of activations, in groups of four
inline I i_dot(I acc, int8x16_t w, int8x16_t upper, int8x16_t lower) {
  return {vdotq_s32(acc.upper, w, upper), vdotq_s32(acc.lower, w, lower)};
}
#else
typedef int32x4_t I;
inline I i_zero() { return vdupq_n_s32(0); }
inline int32x4_t i_whole(I x) { return x; }
inline I i_add(I a, int32x4_t b) { return vaddq_s32(a, b); }
// acc + products of a and b, each product added to some lane
inline I i_madd(I acc, S a, S b) {
  return vmlal_high_s16(vmlal_s16(acc, vget_low_s16(a), vget_low_s16(b)), a, b);
}
#endif
inline V i_float(I x) { return vcvtq_f32_s32(i_whole(x)); }
inline S s_load(const void* p) { return v_any<S>(p); }
inline S s_load_bytes(const void* p) { return vmovl_s8(v_any<int8x8_t>(p)); }  // 2 W int8
inline S s_nibble(S v, int k) {  // bits 4k to 4k + 3 of each
  uint16x8_t words = vreinterpretq_u16_s16(v);
  if (k == 3) return vreinterpretq_s16_u16(vshrq_n_u16(words, 12));
  uint16x8_t low = k == 0 ? words : k == 1 ? vshrq_n_u16(words, 4) : vshrq_n_u16(words, 8);
  return vreinterpretq_s16_u16(vandq_u16(low, vdupq_n_u16(15)));
}
// Sums of lanes, as floats: those of a and b in turn, each a sum of two; and the four whole sums.
inline V i_pair(I a, I b) {
  int32x4_t x = i_whole(a), y = i_whole(b);
  return vcvtq_f32_s32(vaddq_s32(vzip1q_s32(x, y), vzip2q_s32(x, y)));
}
inline V i_quad(I a, I b, I c, I d) {
  return vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(i_whole(a), i_whole(b)), vpaddq_s32(i_whole(c), i_whole(d))));
}
inline void v_quarters(V v, float* out) { v_store(out, v); }  // out (4,) = the sum of v's 128 bits
// Whole numbers a and b as 2 W int16 to p; total + a + b
inline I s_store(int16_t* p, V a, V b, I total) {
  int32x4_t x = vcvtq_s32_f32(a), y = vcvtq_s32_f32(b);
  S words = vcombine_s16(vmovn_s32(x), vmovn_s32(y));
  memcpy(p, &words, sizeof words);
  return i_add(total, vaddq_s32(x, y));
}
// The Count floats at p (1), each in its part of the lanes.
template <int Count>
inline V v_spread(const float* p) {
  static_assert(Count == 1, "what can be spread");
  return v_set(*p);
}
inline V v_load_bytes(const int8_t* p) { return V{(float)p[0], (float)p[1], (float)p[2], (float)p[3]}; }
// Columns [column, column + W) of a block of 4-bit ones
inline V v_load_nibbles(const uint8_t* block, int column) {
  uint32x4_t words = vmovl_u16(v_any<uint16x4_t>(block + column % 8 * 2));
  return vcvtq_f32_u32(vandq_u32(vshlq_u32(words, vdupq_n_s32(-4 * (column / 8))), vdupq_n_u32(15)));
}

inline void v_transpose(V r[W]) {
  V a = vzip1q_f32(r[0], r[2]), b = vzip2q_f32(r[0], r[2]), c = vzip1q_f32(r[1], r[3]), d = vzip2q_f32(r[1], r[3]);
  r[0] = vzip1q_f32(a, c);
  r[1] = vzip2q_f32(a, c);
  r[2] = vzip1q_f32(b, d);
  r[3] = vzip2q_f32(b, d);
}

#ifdef QWEN15_BF16_PAIRS
typedef bfloat16x8_t B;  // 2 W bf16
inline B b_load(const void* p) { return v_any<B>(p); }
inline B b_load_part(const uint16_t* p, int n) {
  uint16_t whole[2 * W] = {0};
  memcpy(whole, p, n * sizeof(uint16_t));
  return b_load(whole);
}
inline B b_repeat(const uint16_t* p) {  // the pair at p, in every lane
  uint32_t pair;
  memcpy(&pair, p, sizeof pair);
  return vreinterpretq_bf16_u32(vdupq_n_u32(pair));
}
inline V b_floats(B x) { return vreinterpretq_f32_bf16(x); }  // the same bits
inline B b_bits(V x) { return vreinterpretq_bf16_f32(x); }
// bf16 stored as the upper halves of floats -> pairs of an even and an odd one
inline B b_join(V even, V odd) {
  uint32x4_t low = vshrq_n_u32(vreinterpretq_u32_f32(even), 16);
  return vreinterpretq_bf16_u32(vorrq_u32(low, vreinterpretq_u32_f32(odd)));
}
// Two bf16 per dword: acc[i] += a[2i] b[2i] + a[2i + 1] b[2i + 1]
inline V v_dot_pairs(V acc, B a, B b) { return vbfdotq_f32(acc, a, b); }
#endif

}  // namespace

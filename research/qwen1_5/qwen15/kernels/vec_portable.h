// Vectors written in the compiler's own vector types: 4 floats; any CPU, aarch64 among them.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

constexpr int W = 4;
#ifdef __aarch64__
constexpr int kTileRows = 6, kTileVecs = 4;  // 24 of 32 registers accumulate
constexpr int kDotTokens = 12;                 // times 2 rows: 24 as well
#else
constexpr int kTileRows = 4, kTileVecs = 2;  // 8 of 16 registers accumulate
constexpr int kDotTokens = 4;                  // times 2 rows: 8 as well
#endif
constexpr int64_t kPanelDepth = 1024;  // inputs of a packed panel
typedef float V __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef uint16_t H __attribute__((vector_size(8)));

inline V v_zero() { return V{0, 0, 0, 0}; }
inline V v_set(float x) { return V{x, x, x, x}; }
inline V v_load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void v_store(float* p, V v) { memcpy(p, &v, sizeof v); }
inline V v_add(V a, V b) { return a + b; }
inline V v_sub(V a, V b) { return a - b; }
inline V v_mul(V a, V b) { return a * b; }
inline V v_div(V a, V b) { return a / b; }
inline V v_fma(V a, V b, V c) { return a * b + c; }
inline V v_mac(V acc, V a, V b) { return v_fma(a, b, acc); }
inline V v_max(V a, V b) { return a > b ? a : b; }
inline V v_min(V a, V b) { return a < b ? a : b; }
inline float v_sum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
// out[i] = sum of v_i
inline void v_sum4(V v0, V v1, V v2, V v3, float* out) {
  out[0] = v_sum(v0);
  out[1] = v_sum(v1);
  out[2] = v_sum(v2);
  out[3] = v_sum(v3);
}
inline float v_highest(V v) {
  float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
inline V v_round(V v) {  // to nearest, for |v| < 2^22
  V magic = v_set(12582912.0f);
  V sum = v + magic;
  asm volatile("" : "+m"(sum));  // the compiler must not simplify (v + c) - c
  return sum - magic;
}
inline V v_scale2(V v, V n) {  // n in [-126, 127]
  U exponent = (U)((__builtin_convertvector(n, I) + 127) << 23);
  return v * (V)exponent;
}

// v where x >= low, 0 elsewhere
inline V v_keep_from(V x, V low, V v) { return (V)((U)v & (U)(x >= low)); }
inline bool v_any_nan(V v) {
  U nan = (U)(v != v);
  return (nan[0] | nan[1] | nan[2] | nan[3]) != 0;
}

inline U widen(H h) { return __builtin_convertvector(h, U); }
inline V v_load_bf16(const uint16_t* p) {
  H h;
  memcpy(&h, p, sizeof h);
  return (V)(widen(h) << 16);
}
inline V v_load_f16(const uint16_t* p) {
  H h;
  memcpy(&h, p, sizeof h);
  U bits = widen(h);
  // Without float denormals on the way: a host program may have told the CPU to flush them to zero.
  U magnitude = (bits & 0x7fff) << 13;
  U small = (U)((bits & 0x7c00) == 0);
  U denormal = (U)(__builtin_convertvector(bits & 0x3ff, V) * v_set(5.9604644775390625e-08f));  // mantissa * 2^-24
  U scaled = (small & denormal) | (~small & (magnitude + 0x38000000));
  U special = (U)((bits & 0x7c00) == 0x7c00);
  U result = (special & (magnitude | 0x7f800000)) | (~special & scaled);
  return (V)(result | ((bits & 0x8000) << 16));
}
inline uint16_t half_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000) {                                  // denormal: let the adder round to 2^-24
    float value, base = 0.5f;
    memcpy(&value, &magnitude, 4);
    float sum = value + base;
    uint32_t sum_bits;
    memcpy(&sum_bits, &sum, 4);
    return (uint16_t)(sign | (sum_bits - 0x3f000000));
  }
  uint32_t odd = (magnitude >> 13) & 1;
  return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13));
}
inline void v_store_f16(uint16_t* p, V v) {
  for (int i = 0; i < W; ++i) p[i] = half_bits(v[i]);
}
inline void v_store_bf16(uint16_t* p, V v) {
  U bits = (U)v;
  U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  U nan = (U)(v != v);
  H h = __builtin_convertvector((nan & ((bits >> 16) | 0x40)) | (~nan & rounded), H);
  memcpy(p, &h, sizeof h);
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

// 2 W bf16: the even ones to v[0], the odd ones to v[1]; and back into their order.
inline void v_load_bf16_pair(const uint16_t* p, V* v) {
  U x;
  memcpy(&x, p, sizeof x);
  U low = x << 16, high = x & 0xffff0000u;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  v[0] = (V)low;
  v[1] = (V)high;
#else
  v[0] = (V)high;
  v[1] = (V)low;
#endif
}
inline void v_load_part_bf16_pair(const uint16_t* p, int n, V* v) {
  uint16_t whole[2 * W] = {0};
  memcpy(whole, p, n * sizeof(uint16_t));
  v_load_bf16_pair(whole, v);
}
inline void v_interleave(V* v) {
  V a = v[0], b = v[1];
  v[0] = V{a[0], b[0], a[1], b[1]};
  v[1] = V{a[2], b[2], a[3], b[3]};
}

// Integers: I, W of 32 bits, and S, 2 W of 16 bits.
typedef int16_t S __attribute__((vector_size(16)));
typedef uint16_t SU __attribute__((vector_size(16)));

inline I i_zero() { return I{0, 0, 0, 0}; }
inline V i_float(I x) { return __builtin_convertvector(x, V); }
inline S s_load(const void* p) {
  S v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline S s_load_bytes(const void* p) {  // 2 W int8
  typedef int8_t B __attribute__((vector_size(8)));
  B v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, S);
}
inline S s_nibble(S v, int k) { return (S)(((SU)v >> (4 * k)) & 15); }  // bits 4k to 4k + 3 of each
// acc + products of a and b, each product added to some lane
inline I i_madd(I acc, S a, S b) {
  typedef int16_t Half __attribute__((vector_size(8)));
  Half a0, a1, b0, b1;
  memcpy(&a0, &a, 8), memcpy(&a1, (const char*)&a + 8, 8);
  memcpy(&b0, &b, 8), memcpy(&b1, (const char*)&b + 8, 8);
  acc += __builtin_convertvector(a0, I) * __builtin_convertvector(b0, I);
  return acc + __builtin_convertvector(a1, I) * __builtin_convertvector(b1, I);
}
// Sums of lanes, as floats: those of a and b in turn, each a sum of two; and the four whole sums.
inline V i_pair(I a, I b) { return i_float(I{a[0] + a[2], b[0] + b[2], a[1] + a[3], b[1] + b[3]}); }
inline V i_quad(I a, I b, I c, I d) {
  return i_float(I{a[0] + a[1] + a[2] + a[3], b[0] + b[1] + b[2] + b[3], c[0] + c[1] + c[2] + c[3], d[0] + d[1] + d[2] + d[3]});
}
inline void v_quarters(V v, float* out) { v_store(out, v); }  // out (4,) = the sum of v's 128 bits
// Whole numbers a and b as 2 W int16 to p; total + a + b
inline I s_store(int16_t* p, V a, V b, I total) {
  I x = __builtin_convertvector(a, I), y = __builtin_convertvector(b, I);
  for (int i = 0; i < W; ++i) p[i] = (int16_t)x[i], p[W + i] = (int16_t)y[i];
  return total + x + y;
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
  H words;
  memcpy(&words, block + column % 8 * 2, sizeof words);
  return __builtin_convertvector((widen(words) >> (4 * (column / 8))) & 15, V);
}

inline void v_transpose(V r[W]) {
  V t[W];
  for (int i = 0; i < W; ++i) t[i] = V{r[0][i], r[1][i], r[2][i], r[3][i]};
  for (int i = 0; i < W; ++i) r[i] = t[i];
}

}  // namespace

// How a row of numbers in each dtype meets float32 or bf16 activations: the traits the matmuls and attention are built
// on.
#pragma once
#include <stdint.h>
#include <string.h>
#include "types.h"
#include "vec.h"

namespace qwen15 {
namespace {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// 2 W elements as two float vectors, in whatever order is cheapest, and back from that order.
#define QWEN15_PAIR_IN_ORDER                                \
  static inline void pair(const E* p, V* v) {               \
    v[0] = floats(p);                                       \
    v[1] = floats(p + W);                                   \
  }                                                         \
  static inline void pair_part(const E* p, int n, V* v) {   \
    v[0] = floats_part(p, n < W ? n : W);                   \
    v[1] = n > W ? floats_part(p + W, n - W) : v_zero();    \
  }                                                         \
  static inline void unpair(V*) {}

// What was loaded meets the activations as it is, in one multiplication.
#define QWEN15_WHOLE                                                               \
  static constexpr int parts = 1;                                                  \
  static inline L part(L w, int) { return w; }                                     \
  static inline V x_part(const X* x, int) { return v_load(x); }                    \
  static inline V meet(V acc, L w, V x) { return v_mac(acc, w, x); }               \
  static inline V mac(V acc, L w, const X* x) { return v_fma(w, v_load(x), acc); }

// Row in memory -> float vectors; activations are float32.
struct F32Row {
  typedef float E;  // element in memory
  typedef float X;  // element of the activations
  typedef V L;      // loaded
  static constexpr int step = W;
  static inline L load(const E* p) { return v_load(p); }
  static inline L load_part(const E* p, int n) { return v_load_part(p, n); }
#ifdef QWEN15_LOAD_REST
  static inline L load_rest(const E* p, int n) { return v_load_rest(p, n); }
#endif
  static inline V floats(const E* p) { return v_load(p); }
  static inline V floats_part(const E* p, int n) { return v_load_part(p, n); }
  QWEN15_WHOLE
  static inline void store(E* p, V v) { v_store(p, v); }
  QWEN15_PAIR_IN_ORDER
};

struct F16Row {
  typedef uint16_t E;
  typedef float X;
  typedef V L;
  static constexpr int step = W;
  static inline L load(const E* p) { return v_load_f16(p); }
  static inline L load_part(const E* p, int n) { return v_load_part_f16(p, n); }
#ifdef QWEN15_LOAD_REST
  static inline L load_rest(const E* p, int n) { return v_load_rest_f16(p, n); }
#endif
  static inline V floats(const E* p) { return v_load_f16(p); }
  static inline V floats_part(const E* p, int n) { return v_load_part_f16(p, n); }
  QWEN15_WHOLE
  static inline void store(E* p, V v) { v_store_f16(p, v); }
  QWEN15_PAIR_IN_ORDER
};

struct BF16Row {
  typedef uint16_t E;
  typedef float X;
  typedef V L;
  static constexpr int step = W;
  static inline L load(const E* p) { return v_load_bf16(p); }
  static inline L load_part(const E* p, int n) { return v_load_part_bf16(p, n); }
#ifdef QWEN15_LOAD_REST
  static inline L load_rest(const E* p, int n) { return v_load_rest_bf16(p, n); }
#endif
  static inline V floats(const E* p) { return v_load_bf16(p); }
  static inline V floats_part(const E* p, int n) { return v_load_part_bf16(p, n); }
  QWEN15_WHOLE
  static inline void store(E* p, V v) { v_store_bf16(p, v); }
  static inline void pair(const E* p, V* v) { v_load_bf16_pair(p, v); }
  static inline void pair_part(const E* p, int n, V* v) { v_load_part_bf16_pair(p, n, v); }
  static inline void unpair(V* v) { v_interleave(v); }
};

#ifdef QWEN15_BF16_PAIRS
// bf16 rows against bf16 activations, two products per float lane and instruction.
struct PairRow {
  typedef uint16_t E;
  typedef uint16_t X;
  typedef B L;
  static constexpr int step = 2 * W;
  static inline L load(const E* p) { return b_load(p); }
  static inline L load_part(const E* p, int n) { return b_load_part(p, n); }
#ifdef QWEN15_LOAD_REST
  static inline L load_rest(const E* p, int n) { return b_load_rest(p, n); }
#endif
  static inline V floats(const E* p) { return v_load_bf16(p); }
  static inline V floats_part(const E* p, int n) { return v_load_part_bf16(p, n); }
  static constexpr int parts = 1;
  static inline L part(L w, int) { return w; }
  static inline B x_part(const X* x, int) { return b_load(x); }
  static inline V meet(V acc, L w, B x) { return v_dot_pairs(acc, w, x); }
  static inline V mac(V acc, L w, const X* x) { return v_dot_pairs(acc, w, b_load(x)); }
  static inline void store(E* p, V v) { v_store_bf16(p, v); }
  static inline void pair(const E* p, V* v) { v_load_bf16_pair(p, v); }
  static inline void pair_part(const E* p, int n, V* v) { v_load_part_bf16_pair(p, n, v); }
  static inline void unpair(V* v) { v_interleave(v); }
};
#else
typedef BF16Row PairRow;
#endif

#ifdef QWEN15_SPLIT
// bf16 rows, 2 W columns with two instructions: the even ones, then the odd ones; activations lie in that order (v_split).
struct SplitRow {
  typedef uint16_t E;
  typedef float X;
  typedef V L;
  static constexpr int step = 2 * W, parts = 2;
  static inline L load(const E* p) { return v_load_pairs(p); }
  static inline L load_part(const E* p, int n) { return v_load_part_pairs(p, n); }
  static inline V part(L w, int i) { return i == 0 ? v_even_bf16(w) : v_odd_bf16(w); }
  static inline V x_part(const X* x, int i) { return v_load(x + i * W); }
  static inline V meet(V acc, V w, V x) { return v_mac(acc, w, x); }
};
#else
typedef PairRow SplitRow;
#endif
#undef QWEN15_PAIR_IN_ORDER
#undef QWEN15_WHOLE

template <class X>
inline void store_activation(X* p, V v);
template <>
inline void store_activation<float>(float* p, V v) {
  v_store(p, v);
}
template <>
inline void store_activation<uint16_t>(uint16_t* p, V v) {
  v_store_bf16(p, v);
}

// v rounded to bf16 and back: what activations for bf16 weights are where they are not stored as bf16.
inline V v_rounded(V v) {
  uint16_t bits[W];
  v_store_bf16(bits, v);
  return v_load_bf16(bits);
}

inline V load_vector(Vector x, int64_t i) {
  if (x.dtype == DType::f32) return v_load((const float*)x.data + i);
  if (x.dtype == DType::f16) return v_load_f16((const uint16_t*)x.data + i);
  return v_load_bf16((const uint16_t*)x.data + i);
}
inline V load_vector_part(Vector x, int64_t i, int n) {
  if (x.dtype == DType::f32) return v_load_part((const float*)x.data + i, n);
  if (x.dtype == DType::f16) return v_load_part_f16((const uint16_t*)x.data + i, n);
  return v_load_part_bf16((const uint16_t*)x.data + i, n);
}
inline float load_scalar(Vector x, int64_t i) {
  float first[W];
  v_store(first, load_vector_part(x, i, 1));
  return first[0];
}
// First n elements of v to p.
inline void v_store_part(float* p, V v, int n) {
  float whole[W];
  v_store(whole, v);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}

// First n (at most W) elements of y to column `col` of row t: of `act` when `out` is null, of out (T, stride)
// otherwise.
inline void write_output(float* out, int64_t stride, Activations act, int64_t t, int64_t col, V y, int n) {
  if (out != nullptr) {
    float* p = out + t * stride + col;
    if (n == W) v_store(p, y);
    else v_store_part(p, y, n);
  } else if (act.pairs) {
    uint16_t* p = (uint16_t*)act.data + t * act.stride + col;
    uint16_t bits[W];
    if (n == W) return v_store_bf16(p, y);
    v_store_bf16(bits, y);
    memcpy(p, bits, n * sizeof(uint16_t));
  } else {
    float* p = (float*)act.data + t * act.stride + col;
    if (act.rounded) y = v_rounded(y);
    if (n == W) v_store(p, y);
    else v_store_part(p, y, n);
  }
}

// Zero an activation row from `cols` up to its stride, so that whole-vector loads find nothing there.
inline void clear_tail(Activations act, int64_t t, int64_t cols) {
  int64_t element = act.pairs ? 2 : 4;
  memset((char*)act.data + (t * act.stride + cols) * element, 0, (act.stride - cols) * element);
}

// e^x, within 2 units in the last place; below -87 it is 0 (never denormal). Cody and Waite's reduction and a
// degree-6 polynomial for 2^(f ln 2) on |f| <= 1/2.
inline V v_exp(V x) {
  V low = v_set(-87.0f);
  x = v_min(x, v_set(88.0f));
  V clamped = v_max(x, low);
  V n = v_round(v_mul(clamped, v_set(1.44269504088896341f)));
  V r = v_fma(n, v_set(-0.693359375f), clamped);
  r = v_fma(n, v_set(2.12194440e-4f), r);
  V p = v_set(1.9875691500e-4f);
  p = v_fma(p, r, v_set(1.3981999507e-3f));
  p = v_fma(p, r, v_set(8.3334519073e-3f));
  p = v_fma(p, r, v_set(4.1665795894e-2f));
  p = v_fma(p, r, v_set(1.6666665459e-1f));
  p = v_fma(p, r, v_set(5.0000001201e-1f));
  p = v_fma(p, v_mul(r, r), v_add(r, v_set(1.0f)));
  return v_keep_from(x, low, v_scale2(p, n));
}

#ifdef QWEN15_BF16_PAIRS
// 2^x within 3e-6 of it: for what is rounded to bf16 afterwards. 0 far below, minus infinity among it; x at most 126.
inline V v_exp2_short(V x) {
  x = v_max(x, v_set(-200.0f));
  V n = v_round(x), f = v_sub(x, n);
  V p = v_set(9.57010142e-3f);
  p = v_fma(p, f, v_set(5.59178603e-2f));
  p = v_fma(p, f, v_set(2.40247448e-1f));
  p = v_fma(p, f, v_set(6.93121815e-1f));
  return v_scale2(v_fma(p, f, v_set(9.99999261e-1f)), n);
}
#endif

inline V v_silu(V x) { return v_div(x, v_add(v_set(1.0f), v_exp(v_sub(v_zero(), x)))); }

}  // namespace
}  // namespace qwen15

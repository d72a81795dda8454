// A packed panel of weights against many tokens: register tiles of kTileRows tokens x kTileVecs vectors.
//
//   a (M, k) activations; panel (k / depth, N vectors, depth) f32, or pairs of bf16; c (M, N vectors) float32
#pragma once
#include "matmul_dot.h"

namespace qwen15 {
namespace {

// Panel element and how `kTileRows` activations meet it. Inputs come `depth` at a time.
struct FloatTile {
  typedef float A;  // activations
  typedef float P;  // panel
  static constexpr int depth = 1;
  static inline V load(const P* p) { return v_load(p); }
  static inline V broadcast(const A* a) { return v_set(*a); }
  static inline void store(P* p, V v) { v_store(p, v); }
  static inline V mac(V acc, V w, V a) { return v_mac(acc, w, a); }
};
#ifdef QWEN15_BF16_PAIRS
struct PairTile {
  typedef uint16_t A;
  typedef uint16_t P;
  static constexpr int depth = 2;
  static inline V load(const P* p) { return b_floats(b_load(p)); }
  static inline void store(P* p, V v) { memcpy(p, &v, sizeof v); }
  static inline V broadcast(const A* a) { return b_floats(b_repeat(a)); }
  static inline V mac(V acc, V w, V a) { return v_dot_pairs(acc, b_bits(w), b_bits(a)); }
};
#endif

// c (M, N vectors) (+)= a (M, k) panel (k / depth, N vectors), float32 products summed in parts of kSum
template <class T, int M, int N>
__attribute__((noinline)) void tile(const typename T::A* a, int64_t a_stride, const typename T::P* panel, int64_t k,
                                    float* c, int64_t c_stride, bool accumulate) {
  constexpr int64_t kLine = 64 / sizeof(typename T::A);
  int64_t i = 0, most = T::depth == 1 ? kSum : k;
  do {
    V acc[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m][n] = v_zero();
    const int64_t stop = k - i < most ? k : i + most;
    auto step = [&](int64_t j) {
      V w[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) w[n] = T::load(panel + n * W * T::depth);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        V x = T::broadcast(a + m * a_stride + j);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[m][n] = T::mac(acc[m][n], w[n], x);
      }
      panel += N * W * T::depth;
    };
    // One cache line of every row at a time; the same lines of the rows after these are asked for meanwhile.
    for (; i + kLine <= stop; i += kLine) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) __builtin_prefetch(a + (M + m) * a_stride + i, 0, 2);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kLine; j += T::depth) step(i + j);
    }
    for (; i < stop; i += T::depth) step(i);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        float* at = c + m * c_stride + n * W;
        v_store(at, accumulate ? v_add(v_load(at), acc[m][n]) : acc[m][n]);
      }
    accumulate = true;
  } while (i < k);
}

// Rows of memory that will be packed next; `fetch` asks for a share of them, so that they are in L2 by then.
struct Ahead {
  const char* data = nullptr;
  int64_t stride = 0, row_lines = 0, lines = 0, at = 0;

  Ahead() {}
  Ahead(const void* rows, int64_t count, int64_t row_stride, int64_t row_bytes)
      : data((const char*)rows), stride(row_stride), row_lines((row_bytes + 63) / 64), lines(count * row_lines) {}
  void fetch(int64_t count) {
    for (int64_t end = at + count < lines ? at + count : lines; at < end; ++at)
      __builtin_prefetch(data + at / row_lines * stride + at % row_lines * 64, 0, 2);
  }
};

// Rows of a go in groups of nearly the same size: one of a single row would take as long as one of three.
template <class T, int N>
void tile_rows(const typename T::A* a, int64_t a_stride, int64_t rows, const typename T::P* panel, int64_t k, float* c,
               int64_t c_stride, bool accumulate, Ahead& ahead) {
  int64_t groups = (rows + kTileRows - 1) / kTileRows, share = (ahead.lines - ahead.at) / groups + 1;
  for (int64_t left = groups; left > 0; --left) {
    int64_t m = (rows + left - 1) / left;
    ahead.fetch(share);
    auto* run = m == 1   ? tile<T, 1, N>
                : m == 2 ? tile<T, 2, N>
                : m == 3 ? tile<T, 3, N>
                : m == 4 ? tile<T, 4, N>
                : m == 5 ? tile<T, (5 < kTileRows ? 5 : kTileRows), N>
                         : tile<T, kTileRows, N>;
    run(a, a_stride, panel, k, c, c_stride, accumulate);
    rows -= m;
    a += m * a_stride;
    c += m * c_stride;
  }
}

// c (rows, vecs vectors) (+)= a panel, for a panel of 1 to kTileVecs vectors
template <class T>
void multiply_panel(const typename T::A* a, int64_t a_stride, int64_t rows, const typename T::P* panel, int vecs,
                    int64_t k, float* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
  switch (vecs) {
    case 1: return tile_rows<T, 1>(a, a_stride, rows, panel, k, c, c_stride, accumulate, ahead);
    case 2: return tile_rows<T, 2>(a, a_stride, rows, panel, k, c, c_stride, accumulate, ahead);
    case 3: return tile_rows<T, (3 < kTileVecs ? 3 : kTileVecs)>(a, a_stride, rows, panel, k, c, c_stride, accumulate, ahead);
    default: return tile_rows<T, kTileVecs>(a, a_stride, rows, panel, k, c, c_stride, accumulate, ahead);
  }
}

}  // namespace
}  // namespace qwen15

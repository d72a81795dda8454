// AMX: matrices of bf16 pairs multiplied in tile registers.
//
//   c (M, N) float32 (+)= a (M, k) b (k, N); a row-major, b as vectors of 16 columns: (k / 2, 16 columns, 2) bf16 each
//
// A tile is 16 rows of 64 bytes. Two tiles of a against two of b are four products of 16 x 16: one load for each product,
// which takes 16 cycles, so that two loads a cycle from the first cache level (8 cycles a tile) are half of what there is
// time for. a may be weights as the checkpoint stores them, or activations: neither is copied.
#pragma once
#include "matmul_tile.h"

namespace qwen15 {
namespace {

#ifdef QWEN15_AMX
constexpr int kAmxRows = 16;           // of a tile of a, and columns of one of b
constexpr int kAmxDepth = 32;          // bf16 in a row of a tile of a
constexpr int64_t kAmxAtOnce = 512;    // inputs from which products are stored: 2 x 32 x 512 x 2 bytes of a and b, of which
                                       // b's half stays in the first cache level while the rows of a pass by

// The shapes of the eight tiles, palette 1: 0 to 3 are c, 4 and 5 are a, 6 and 7 are b.
struct alignas(64) AmxShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {0};
  uint16_t row_bytes[16] = {0};
  uint8_t rows[16] = {0};

  // a has `first` rows in its first tile and `second`, perhaps none, in its other one.
  AmxShapes(int first, int second) {
    const int count[8] = {first, first, second, second, first, second, kAmxRows, kAmxRows};
    for (int i = 0; i < 8; ++i) {
      rows[i] = (uint8_t)count[i];
      row_bytes[i] = count[i] > 0 ? 64 : 0;
    }
  }
};

// Rows of a that this thread's tiles are shaped for, 0 while they have no shape.
inline int& amx_rows() {
  static thread_local int rows = 0;
  return rows;
}

// Shapes the tiles for 1 to 32 rows of a.
inline void amx_shape(int rows) {
  if (amx_rows() == rows) return;
  amx_rows() = rows;
  int first = rows < kAmxRows ? rows : kAmxRows;
  const AmxShapes shapes(first, rows - first);
  asm volatile("" : : "r"(&shapes) : "memory");  // GCC's intrinsic names 8 of the 64 bytes that it reads
  _tile_loadconfig(&shapes);
}

// Gives the tiles back: a thread that sleeps with them in use costs the core its deepest sleep, and a switch 8 KiB more.
inline void amx_release() {
  if (amx_rows() == 0) return;
  amx_rows() = 0;
  _tile_release();
}

// Vectors of 16 columns: pairs of inputs are `row` bytes from each other, vectors `vector` bytes.
struct AmxPanel {
  const uint16_t* data;
  int64_t row, vector;
};

// What is asked for meanwhile: `lines` cache lines at every step, `apart` bytes from each other, those of the next step
// `step` bytes further on.
struct AmxAhead {
  const char* at = nullptr;
  int64_t lines = 0, apart = 0, step = 0;
};

// 1 or 2 tiles of a's rows against N vectors of b; k is whole tiles, strides in elements. `amx_shape` says how many rows.
template <int M, int N>
__attribute__((noinline)) void amx_block(const uint16_t* a, int64_t a_stride, AmxPanel b, int64_t k, float* c,
                                         int64_t c_stride, bool accumulate, AmxAhead ahead) {
  const uint16_t *a1 = a + kAmxRows * a_stride;
  const char *b0 = (const char*)b.data, *b1 = b0 + b.vector;
  float *c1 = c + kAmxRows, *c2 = c + kAmxRows * c_stride, *c3 = c2 + kAmxRows;
  const int64_t a_bytes = a_stride * 2, c_bytes = c_stride * 4;
  asm volatile("" : : : "memory");  // what is loaded has been stored: GCC's intrinsics do not say that they read
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if (N == 2) _tile_loadd(1, c1, c_bytes);
    if (M == 2) _tile_loadd(2, c2, c_bytes);
    if (M == 2 && N == 2) _tile_loadd(3, c3, c_bytes);
  } else {
    _tile_zero(0);
    if (N == 2) _tile_zero(1);
    if (M == 2) _tile_zero(2);
    if (M == 2 && N == 2) _tile_zero(3);
  }
  for (int64_t i = 0; i < k; i += kAmxDepth, a += kAmxDepth, a1 += kAmxDepth) {
    for (int64_t line = 0; line < ahead.lines; ++line) __builtin_prefetch(ahead.at + line * ahead.apart, 0, 2);
    ahead.at += ahead.step;
    _tile_loadd(6, b0, b.row);
    _tile_loadd(4, a, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (N == 2) {
      _tile_loadd(7, b1, b.row);
      _tile_dpbf16ps(1, 4, 7);
    }
    b0 += kAmxRows * b.row;
    b1 += kAmxRows * b.row;
    if (M == 2) {
      _tile_loadd(5, a1, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (N == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (N == 2) _tile_stored(1, c1, c_bytes);
  if (M == 2) _tile_stored(2, c2, c_bytes);
  if (M == 2 && N == 2) _tile_stored(3, c3, c_bytes);
}

// 1 to 32 rows of a against 1 or 2 vectors of b.
inline void amx_multiply(int rows, int vecs, const uint16_t* a, int64_t a_stride, AmxPanel b, int64_t k, float* c,
                         int64_t c_stride, bool accumulate, AmxAhead ahead = AmxAhead()) {
  auto* block = rows > kAmxRows ? vecs == 2 ? amx_block<2, 2> : amx_block<2, 1>
                                : vecs == 2 ? amx_block<1, 2> : amx_block<1, 1>;
  amx_shape(rows);
  block(a, a_stride, b, k, c, c_stride, accumulate, ahead);
}

// Products of tiles that are loaded once, four of them `repeats` times; returns the operations done.
inline double amx_peak_flops(int64_t repeats) {
  alignas(64) uint16_t ones[kAmxRows * kAmxDepth];
  for (uint16_t& one : ones) one = 0x3f80;
  amx_shape(2 * kAmxRows);
  asm volatile("" : : "r"(ones) : "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  for (int64_t i = 0; i < repeats; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  amx_release();
  return 2.0 * 4 * kAmxRows * kAmxRows * kAmxDepth * repeats;
}

// A panel whose vectors lie one after another, each (k / 2 rounded up to whole pairs, 16 columns, 2).
struct AmxTile : PairTile {
  static int64_t vector(int64_t k) { return (k + 1) / 2 * 2 * W; }
};

template <>
inline void multiply_panel<AmxTile>(const uint16_t* a, int64_t a_stride, int64_t rows, const uint16_t* panel, int vecs,
                                    int64_t k, float* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
  constexpr int kRows = 2 * kAmxRows;
  const int64_t whole = k / kAmxDepth * kAmxDepth, vector = AmxTile::vector(k), blocks = (rows + kRows - 1) / kRows;
  const int64_t share = (ahead.lines - ahead.at) / (blocks * ((vecs + 1) / 2) * ((whole + kAmxAtOnce - 1) / kAmxAtOnce) + 1) + 1;
  for (int64_t k0 = 0; k0 < whole; k0 += kAmxAtOnce) {
    int64_t depth = whole - k0 < kAmxAtOnce ? whole - k0 : kAmxAtOnce;
    for (int v = 0; v < vecs; v += 2)
      for (int64_t m = 0; m < rows; m += kRows) {
        ahead.fetch(share);
        amx_multiply(rows - m < kRows ? (int)(rows - m) : kRows, vecs - v < 2 ? 1 : 2, a + m * a_stride + k0, a_stride,
                     {panel + v * vector + k0 * W, 64, 2 * vector}, depth, c + m * c_stride + v * W, c_stride, accumulate || k0 > 0);
      }
  }
  if (whole < k)  // less than a tile's depth is left
    for (int v = 0; v < vecs; ++v)
      tile_rows<PairTile, 1>(a + whole, a_stride, rows, panel + v * vector + whole * W, k - whole, c + v * W, c_stride,
                             accumulate || whole > 0, ahead);
  ahead.fetch(ahead.lines);
}

// A panel whose vectors lie side by side: (k / 2, vectors, 16 columns, 2), as the other tiles have it.
struct AmxPairs : PairTile {};

template <>
inline void multiply_panel<AmxPairs>(const uint16_t* a, int64_t a_stride, int64_t rows, const uint16_t* panel, int vecs,
                                     int64_t k, float* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
  constexpr int kRows = 2 * kAmxRows;
  const int64_t whole = k / kAmxDepth * kAmxDepth;
  if (whole > 0)
    for (int v = 0; v < vecs; v += 2)
      for (int64_t m = 0; m < rows; m += kRows)
        amx_multiply(rows - m < kRows ? (int)(rows - m) : kRows, vecs - v < 2 ? 1 : 2, a + m * a_stride, a_stride,
                     {panel + v * 2 * W, vecs * 64, 64}, whole, c + m * c_stride + v * W, c_stride, accumulate);
  if (whole < k)  // less than a tile's depth is left
    multiply_panel<PairTile>(a + whole, a_stride, rows, panel + whole * vecs * W, vecs, k - whole, c, c_stride,
                             accumulate || whole > 0, ahead);
}
#endif

}  // namespace
}  // namespace qwen15

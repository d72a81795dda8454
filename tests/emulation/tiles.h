// AMX's tile registers in plain C++, one set for each thread, with the rules of Intel's Architecture Instruction Set
// Extensions Programming Reference, chapter "Intel AMX Instruction Set Reference": what would fault on a CPU ends the
// process here and says why.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#pragma GCC push_options
#pragma GCC optimize("O2")  // in a build that is otherwise not optimised
namespace emulated {

constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;  // palette 1

struct TileRegisters {
  int palette = 0;
  int rows[kTiles] = {0}, bytes[kTiles] = {0};
  unsigned char data[kTiles][kMostRows][kMostBytes] = {};

  static TileRegisters& mine() {
    static thread_local TileRegisters registers;
    return registers;
  }
  [[noreturn]] static void fault(const char* instruction, const char* why) {
    fprintf(stderr, "emulated AMX: %s: %s\n", instruction, why);
    abort();
  }
  void ask(int tile, const char* instruction) const {
    if (palette != 1) fault(instruction, "no palette is loaded (#UD)");
    if (tile < 0 || tile >= kTiles) fault(instruction, "there is no such tile (#UD)");
    if (rows[tile] == 0 || bytes[tile] == 0) fault(instruction, "the tile has no rows (#UD)");
  }
};

inline void load_config(const void* memory) {
  const unsigned char* config = (const unsigned char*)memory;
  TileRegisters& t = TileRegisters::mine();
  t = TileRegisters();
  if (config[0] == 0) return;  // as tilerelease
  if (config[0] != 1) TileRegisters::fault("ldtilecfg", "the palette is neither 0 nor 1 (#GP)");
  for (int i = 2; i < 16; ++i)
    if (config[i] != 0) TileRegisters::fault("ldtilecfg", "reserved bytes are not zero (#GP)");
  if (config[1] != 0) TileRegisters::fault("ldtilecfg", "start_row is for a load that was interrupted");
  for (int i = 0; i < 16; ++i) {
    uint16_t bytes;
    memcpy(&bytes, config + 16 + 2 * i, 2);
    int rows = config[48 + i];
    if (i >= kTiles && (bytes != 0 || rows != 0)) TileRegisters::fault("ldtilecfg", "palette 1 has 8 tiles (#GP)");
    if (bytes > kMostBytes || rows > kMostRows) TileRegisters::fault("ldtilecfg", "a tile is too large (#GP)");
    if ((bytes == 0) != (rows == 0)) TileRegisters::fault("ldtilecfg", "a tile has rows or bytes alone (#GP)");
    if (i < kTiles) t.rows[i] = rows, t.bytes[i] = bytes;
  }
  t.palette = 1;
}

inline void release() { TileRegisters::mine() = TileRegisters(); }

inline void zero(int tile) {
  TileRegisters& t = TileRegisters::mine();
  t.ask(tile, "tilezero");
  memset(t.data[tile], 0, sizeof t.data[tile]);
}

inline void load(int tile, const void* from, int64_t stride) {
  TileRegisters& t = TileRegisters::mine();
  t.ask(tile, "tileloadd");
  memset(t.data[tile], 0, sizeof t.data[tile]);
  for (int r = 0; r < t.rows[tile]; ++r) memcpy(t.data[tile][r], (const char*)from + r * stride, t.bytes[tile]);
}

inline void store(int tile, void* to, int64_t stride) {
  TileRegisters& t = TileRegisters::mine();
  t.ask(tile, "tilestored");
  for (int r = 0; r < t.rows[tile]; ++r) memcpy((char*)to + r * stride, t.data[tile][r], t.bytes[tile]);
}

inline TileRegisters& ask_product(int c, int a, int b, const char* instruction) {
  TileRegisters& t = TileRegisters::mine();
  t.ask(c, instruction), t.ask(a, instruction), t.ask(b, instruction);
  if (c == a || c == b || a == b) TileRegisters::fault(instruction, "two operands are the same tile (#UD)");
  if (t.bytes[a] % 4 != 0 || t.bytes[b] % 4 != 0 || t.bytes[c] % 4 != 0)
    TileRegisters::fault(instruction, "a row is not of whole dwords (#UD)");
  if (t.rows[a] != t.rows[c]) TileRegisters::fault(instruction, "left operand and result differ in rows (#UD)");
  if (t.bytes[b] != t.bytes[c]) TileRegisters::fault(instruction, "right operand and result differ in columns (#UD)");
  if (t.rows[b] != t.bytes[a] / 4) TileRegisters::fault(instruction, "the inner sizes differ (#UD)");
  return t;
}

inline float bf16_of(const unsigned char* p) {  // denormals count as zero
  uint16_t bits;
  memcpy(&bits, p, 2);
  uint32_t whole = (bits & 0x7f80) == 0 ? (uint32_t)(bits & 0x8000) << 16 : (uint32_t)bits << 16;
  float x;
  memcpy(&x, &whole, 4);
  return x;
}
inline float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }

// c[m][n] += sum over k of a[m][2k] b[k][2n] + a[m][2k + 1] b[k][2n + 1], the even products and the odd ones each in a
// sum of their own
inline void multiply_bf16(int c, int a, int b) {
  TileRegisters& t = ask_product(c, a, b, "tdpbf16ps");
  float right[kMostRows][kMostRows][2];
  for (int k = 0; k < t.rows[b]; ++k)
    for (int n = 0; n < t.bytes[b] / 4; ++n)
      for (int e = 0; e < 2; ++e) right[k][n][e] = bf16_of(t.data[b][k] + 4 * n + 2 * e);
  for (int m = 0; m < t.rows[c]; ++m) {
    float even[kMostRows] = {0}, odd[kMostRows] = {0}, sums[kMostRows];
    for (int k = 0; k < t.rows[b]; ++k) {
      float left = bf16_of(t.data[a][m] + 4 * k), left_odd = bf16_of(t.data[a][m] + 4 * k + 2);
      for (int n = 0; n < t.bytes[c] / 4; ++n) {
        even[n] = flushed(__builtin_fmaf(left, right[k][n][0], even[n]));
        odd[n] = flushed(__builtin_fmaf(left_odd, right[k][n][1], odd[n]));
      }
    }
    memcpy(sums, t.data[c][m], t.bytes[c]);
    for (int n = 0; n < t.bytes[c] / 4; ++n) sums[n] = flushed(sums[n] + flushed(even[n] + odd[n]));
    memcpy(t.data[c][m], sums, t.bytes[c]);
  }
}

// c[m][n] += sum over k of the four products of signed bytes in a[m] and b[k]; wraps as int32 does
inline void multiply_int8(int c, int a, int b) {
  TileRegisters& t = ask_product(c, a, b, "tdpbssd");
  for (int m = 0; m < t.rows[c]; ++m)
    for (int n = 0; n < t.bytes[c] / 4; ++n) {
      uint32_t sum;
      memcpy(&sum, t.data[c][m] + 4 * n, 4);
      for (int k = 0; k < t.rows[b]; ++k)
        for (int e = 0; e < 4; ++e)
          sum += (uint32_t)((int)(int8_t)t.data[a][m][4 * k + e] * (int)(int8_t)t.data[b][k][4 * n + e]);
      memcpy(t.data[c][m] + 4 * n, &sum, 4);
    }
}

}  // namespace emulated
#pragma GCC pop_options

#define _tile_loadconfig(config) emulated::load_config(config)
#define _tile_release() emulated::release()
#undef _tile_zero
#define _tile_zero(tile) emulated::zero(tile)
#undef _tile_loadd
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#undef _tile_stored
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#undef _tile_dpbf16ps
#define _tile_dpbf16ps(c, a, b) emulated::multiply_bf16(c, a, b)
#undef _tile_dpbssd
#define _tile_dpbssd(c, a, b) emulated::multiply_int8(c, a, b)

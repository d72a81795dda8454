// Rows in memory -> the panels that the register tiles read.
#pragma once
#include "matmul_tile.h"

namespace qwen15 {
namespace {

// Rows in memory -> panel for FloatTile: panel[i][r] = rows[r][i], `count` rows, zeros up to vecs * W.
template <class R>
void pack_floats(const typename R::E* const* rows, int count, int64_t k, int vecs, float* panel) {
  for (int64_t i = 0; i < k; i += W) {
    int part = k - i < W ? (int)(k - i) : W;
    for (int v = 0; v < vecs; ++v) {
      V block[W];
      for (int r = 0; r < W; ++r) {
        int row = v * W + r;
        block[r] = row >= count ? v_zero() : part == W ? R::floats(rows[row] + i) : R::floats_part(rows[row] + i, part);
      }
      v_transpose(block);
      for (int j = 0; j < part; ++j) v_store(panel + ((i + j) * vecs + v) * W, block[j]);
    }
  }
}

#ifdef QWEN15_BF16_PAIRS
// bf16 rows -> panel for PairTile: panel[i / 2][r][i % 2] = rows[r][i].
inline void pack_pairs_block(const uint16_t* const* rows, int64_t i, uint16_t* panel, int64_t stride) {
  V block[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) block[r] = _mm512_loadu_ps(rows[r] + i);
  v_transpose(block);
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) _mm512_storeu_ps(panel + j * stride, block[j]);
}

void pack_pairs(const uint16_t* const* rows, int count, int64_t k, int vecs, uint16_t* panel) {
  int64_t stride = (int64_t)vecs * 2 * W;
  for (int64_t i = 0; i < k; i += 2 * W) {
    int part = k - i < 2 * W ? (int)(k - i) : 2 * W;
    for (int v = 0; v < vecs; ++v) {
      uint16_t* to = panel + i / 2 * stride + v * 2 * W;
      int valid = count - v * W < W ? count - v * W : W;
      if (valid == W && part == 2 * W) {
        pack_pairs_block(rows + v * W, i, to, stride);
        continue;
      }
      V block[W];
      for (int r = 0; r < W; ++r)
        block[r] = r < valid ? _mm512_castsi512_ps(PairRow::load_part(rows[v * W + r] + i, part)) : v_zero();
      v_transpose(block);
      for (int j = 0; j < (part + 1) / 2; ++j) _mm512_storeu_ps(to + j * stride, block[j]);
    }
  }
}
#endif

template <class R>
struct Packer {  // the tile a row type is packed for
  typedef FloatTile Tile;
  static void pack(const typename R::E* const* rows, int count, int64_t k, int vecs, float* panel) {
    pack_floats<R>(rows, count, k, vecs, panel);
  }
};
#ifdef QWEN15_BF16_PAIRS
template <>
struct Packer<PairRow> {
  typedef PairTile Tile;
  static void pack(const uint16_t* const* rows, int count, int64_t k, int vecs, uint16_t* panel) {
    pack_pairs(rows, count, k, vecs, panel);
  }
};
#endif

}  // namespace
}  // namespace qwen15

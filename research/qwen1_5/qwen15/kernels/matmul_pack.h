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

#ifdef QWEN15_SPLIT
// bf16 rows -> the same panel, two inputs at a time: half the shuffles. The panel has room for whole vectors of them.
template <>
inline void pack_floats<BF16Row>(const uint16_t* const* rows, int count, int64_t k, int vecs, float* panel) {
  for (int64_t i = 0; i < k; i += 2 * W) {
    int part = k - i < 2 * W ? (int)(k - i) : 2 * W;
    for (int v = 0; v < vecs; ++v) {
      V pairs[W];
#pragma GCC unroll 8
      for (int r = 0; r < W; ++r) {
        int row = v * W + r;
        pairs[r] = row >= count ? v_zero() : part == 2 * W ? v_load_pairs(rows[row] + i) : v_load_part_pairs(rows[row] + i, part);
      }
      v_transpose(pairs);
      float* to = panel + (i * vecs + v) * W;
#pragma GCC unroll 8
      for (int j = 0; j < W; ++j, to += 2 * vecs * W) {
        v_store(to, v_even_bf16(pairs[j]));
        v_store(to + vecs * W, v_odd_bf16(pairs[j]));
      }
    }
  }
}
#endif

#ifdef QWEN15_BF16_PAIRS
// bf16 rows -> panel for PairTile: panel[i / 2][r][i % 2] = rows[r][i].
inline void pack_pairs_block(const uint16_t* const* rows, int64_t i, uint16_t* panel, int64_t stride) {
  V block[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) block[r] = PairTile::load(rows[r] + i);
  v_transpose(block);
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) PairTile::store(panel + j * stride, block[j]);
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
        block[r] = r < valid ? b_floats(PairRow::load_part(rows[v * W + r] + i, part)) : v_zero();
      v_transpose(block);
      for (int j = 0; j < (part + 1) / 2; ++j) PairTile::store(to + j * stride, block[j]);
    }
  }
}
#endif

constexpr int64_t kPanelRows = kTileVecs * W;

// The zero point number `at` of a quantised matrix.
inline int zero_point(const Matrix& m, int64_t at) {
  if (m.zero == nullptr) return m.dtype == DType::q4 ? 8 : 0;
  return m.dtype == DType::q4 ? (int)((const uint8_t*)m.zero)[at] : (int)((const int8_t*)m.zero)[at];
}

// Columns [k0, k0 + k) of `count` quantised rows from `row` on -> panel for FloatTile; k0 and k are whole blocks.
inline void pack_quantised(const Matrix& m, int64_t row, int count, int64_t k0, int64_t k, int vecs, float* panel) {
  int64_t group = m.cols / m.groups, bytes = m.row_bytes();
  bool nibbles = m.dtype == DType::q4;
  V scale[kPanelRows], zero[kPanelRows];
  for (int64_t i = 0, known = -1; i < k; i += kQuantBlock) {
    int64_t column = k0 + i, g = column / group;
    if (g != known)
      for (int r = 0; r < count; ++r) {
        int64_t at = (row + r) * m.groups + g;
        scale[r] = v_set(load_scalar(m.scale, at));
        zero[r] = v_set((float)zero_point(m, at));
      }
    known = g;
    const uint8_t* from = (const uint8_t*)m.data + row * bytes + (nibbles ? column / 2 : column);
    for (int j = 0; j < kQuantBlock; j += W)
      for (int v = 0; v < vecs; ++v) {
        V block[W];
        for (int r = 0; r < W; ++r) {
          int n = v * W + r;
          const uint8_t* p = from + n * bytes;
          V q = n >= count ? v_zero() : nibbles ? v_load_nibbles(p, j) : v_load_bytes((const int8_t*)p + j);
          block[r] = n >= count ? v_zero() : v_mul(v_sub(q, zero[n]), scale[n]);
        }
        v_transpose(block);
        for (int c = 0; c < W; ++c) v_store(panel + ((i + j + c) * vecs + v) * W, block[c]);
      }
  }
}

struct QuantRow {};  // rows of a quantised matrix

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

template <>
struct Packer<QuantRow> {
  typedef FloatTile Tile;
};

// Columns [k0, k0 + k) of `count` rows of a matrix from `row` on -> panel
template <class R>
inline void pack_rows(const Matrix& m, int64_t row, int count, int64_t k0, int64_t k, int vecs,
                      typename Packer<R>::Tile::P* panel) {
  const typename R::E* rows[kPanelRows];
  for (int r = 0; r < count; ++r) rows[r] = (const typename R::E*)m.data + (row + r) * m.cols + k0;
  Packer<R>::pack(rows, count, k, vecs, panel);
}
template <>
inline void pack_rows<QuantRow>(const Matrix& m, int64_t row, int count, int64_t k0, int64_t k, int vecs,
                                float* panel) {
  pack_quantised(m, row, count, k0, k, vecs, panel);
}

}  // namespace
}  // namespace qwen15

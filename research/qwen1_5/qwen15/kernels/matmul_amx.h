// Matmuls on AMX's tiles of bf16.
//
// bf16 weights, a batch of tokens: rows of weights go from memory into tiles as they lie there, and the activations, packed
// once per matmul and thread, are what they meet. Results are turned as in matmul_wide.h. Many tokens: see matmul_panels.h.
// Quantised weights, many tokens: a dequantised weight and an activation are each two bf16, w = w1 + w2 and x = x1 + x2 up
// to 2^-18 of them, and x1 w1 + x1 w2 + x2 w1 leaves out as much again: float32's products but for 2 in 10^5, three tile
// products for one. (Tiles of int8 would take two, with activations of 16 bits, but their sums are of int32 and have to
// leave the tiles at the end of every group of 32 to 128 columns; one bf16 each would round the weights themselves.)
#pragma once
#include "amx.h"
#include "matmul_panels.h"
#include "matmul_wide.h"

namespace qwen15 {
namespace {

#ifdef QWEN15_AMX
// Tokens from which a batch takes tiles. 64 rows of 1024 inputs are 128 KiB: 22000 cycles of memory at 12 GB/s a core and
// 2 GHz, 2000 to 4000 of tiles whatever the tokens (16 columns of a tile, used or not), and on AVX-512 2000 a token at best:
// up to 8 tokens the memory is what takes time on either, and the reading of matmul_few.h is the better one; from there on
// AVX-512 comes near to the memory's time and passes it at 11.
constexpr int64_t kAmxFrom = 9;
constexpr int64_t kAmxMost = 64;  // tokens in 4 vectors; more meet packed panels

// y (tokens, kRowBlock) = the sums in c (rows, vecs vectors)
inline void amx_turn(int vecs, const float* c, int64_t rows, int64_t tokens, float* y) {
  if (vecs == 1) turn<1, 1>(c, rows, tokens, y);
  else if (vecs == 2) turn<2, 1>(c, rows, tokens, y);
  else if (vecs == 3) turn<3, 1>(c, rows, tokens, y);
  else turn<4, 1>(c, rows, tokens, y);
}

// c (rows, vecs vectors) = w (rows, cols) panel, rows at most kRowBlock. What is read after these rows begins at `after`.
inline void amx_rows_of(const uint16_t* w, int64_t rows, int64_t cols, const uint16_t* panel, int64_t vector, int vecs,
                        float* c, const uint16_t* after) {
  constexpr int kRows = 2 * kAmxRows;
  const int64_t whole = cols / kAmxDepth * kAmxDepth, piece = kWideBytes / (vecs * W * 2) / kAmxDepth * kAmxDepth;
  for (int64_t k0 = 0; k0 < whole; k0 += piece) {
    int64_t k = whole - k0 < piece ? whole - k0 : piece;
    bool in_order = k == cols;  // then the next rows are one range
    for (int64_t m = 0; m < rows; m += kRows) {
      int count = rows - m < kRows ? (int)(rows - m) : kRows;
      const uint16_t* next = m + kRows < rows ? w + (m + kRows) * cols + k0 : k0 + piece < whole ? w + k0 + piece : after;
      AmxAhead ahead = {(const char*)next, kRows, in_order ? 64 : cols * 2, in_order ? 64 * kRows : 64};
      for (int v = 0; v < vecs; v += 2)
        amx_multiply(count, vecs - v < 2 ? 1 : 2, w + m * cols + k0, cols, {panel + v * vector + k0 * W, 64, 2 * vector}, k,
                     c + (m * vecs + v) * W, vecs * W, k0 > 0, v == 0 ? ahead : AmxAhead());
    }
  }
  if (whole == cols) return;
  uint16_t rest[kRows * kAmxDepth];  // zeros where the rows have ended, as the panel has them
  for (int64_t m = 0; m < rows; m += kRows) {
    int count = rows - m < kRows ? (int)(rows - m) : kRows;
    memset(rest, 0, sizeof rest);
    for (int r = 0; r < count; ++r) memcpy(rest + r * kAmxDepth, w + (m + r) * cols + whole, (cols - whole) * 2);
    for (int v = 0; v < vecs; v += 2)
      amx_multiply(count, vecs - v < 2 ? 1 : 2, rest, kAmxDepth, {panel + v * vector + whole * W, 64, 2 * vector}, kAmxDepth,
                   c + (m * vecs + v) * W, vecs * W, whole > 0);
  }
}

void amx_batch(Team& team, const Job* jobs, int job_count, Activations x, int64_t tokens) {
  const int64_t cols = jobs[0].w.cols, padded_cols = round_up(cols, kAmxDepth), vector = padded_cols * W;
  const int vecs = (int)((tokens + W - 1) / W);
  const int64_t panel_bytes = vecs * vector * 2, c_floats = kRowBlock * vecs * W, y_floats = tokens * kRowBlock;
  char* memory = (char*)team.scratch(panel_bytes + (c_floats + 2 * y_floats) * sizeof(float));
  auto* panel = (uint16_t*)memory;
  float* c = (float*)(memory + panel_bytes);
  float* y[2] = {c + c_floats, c + c_floats + y_floats};
  for (int v = 0; v < vecs; ++v)
    pack_tokens<PairTile, 1, 1>((const uint16_t*)x.data + v * W * x.stride, x.stride, tokens - v * W, cols, panel + v * vector);
  auto rows_of = [&](const Job& job, int owner) { return WideRows(team, owner, job); };
  for_blocks(team, jobs, job_count, rows_of, [&](const Job& job, const WideRows& share, int64_t block) {
    bool gated = job.up.data != nullptr;
    int64_t row = share.begin + block * kRowBlock, rows = share.end - row < kRowBlock ? share.end - row : kRowBlock;
    for (int part = 0; part <= (gated ? 1 : 0); ++part) {
      const auto* w = (const uint16_t*)(part == 0 ? job.w.data : job.up.data) + row * cols;
      const uint16_t* after = !gated ? w + rows * cols : part == 0 ? (const uint16_t*)job.up.data + row * cols
                                                                   : (const uint16_t*)job.w.data + (row + rows) * cols;
      amx_rows_of(w, rows, cols, panel, vector, vecs, c, after);
      amx_turn(vecs, c, round_up(rows, W), tokens, y[part]);
    }
    finish(job, 0, tokens, row, rows, y[0], y[1], kRowBlock);
  });
}
// x (tokens, stride) float32 -> x.spare: each row's first bf16s and, stride further on, what they leave over. Every thread
// does its share of the tokens, and waits for the others.
inline void amx_split(Team& team, const Activations& x, int64_t tokens, int64_t cols) {
  int64_t first, last;
  team.share(tokens, 1, &first, &last);
  for (int64_t t = first; t < last; ++t) {
    const float* from = (const float*)x.data + t * x.stride;
    uint16_t* to = (uint16_t*)x.spare + t * 2 * x.stride;
    for (int64_t i = 0; i < cols; i += W) {
      V v = v_load(from + i);
      v_store_bf16(to + i, v);
      v_store_bf16(to + x.stride + i, v_sub(v, v_load_bf16(to + i)));
    }
  }
  team.barrier();
}

// Columns [k0, k0 + k) of quantised rows -> a panel of the weights' first bf16s and one of what they leave over.
inline void amx_pack_split(const Matrix& m, int64_t row, int count, int64_t k0, int64_t k, int vecs, float* floats,
                           uint16_t* first, uint16_t* second) {
  pack_quantised(m, row, count, k0, k, vecs, floats);
  const int64_t vector = AmxTile::vector(k);
  for (int64_t i = 0; i < k; i += 2)
    for (int v = 0; v < vecs; ++v) {
      V even = v_load(floats + (i * vecs + v) * W), odd = v_load(floats + ((i + 1) * vecs + v) * W);
      V even1 = v_rounded(even), odd1 = v_rounded(odd);
      PairTile::store(first + v * vector + i * W, b_floats(b_join(even1, odd1)));
      PairTile::store(second + v * vector + i * W,
                      b_floats(b_join(v_rounded(v_sub(even, even1)), v_rounded(v_sub(odd, odd1)))));
    }
}

// x is what `amx_split` has made.
template <>
void one_panel<QuantRow>(Team& team, const Item& item, const Item* next, Activations x) {
  const Job& job = *item.job;
  const int64_t row = item.row, cols = job.w.cols, depth = cols < kPanelDepth ? cols : kPanelDepth;
  const int n = job.w.rows - row < kPanelRows ? (int)(job.w.rows - row) : (int)kPanelRows, vecs = (n + W - 1) / W;
  const bool gated = job.up.data != nullptr;
  const int64_t panel = depth * kPanelRows, c_floats = item.tokens * kPanelRows;
  float* floats = (float*)team.scratch((2 * panel + (gated ? 2 : 1) * c_floats) * sizeof(float));
  uint16_t *first = (uint16_t*)(floats + panel), *second = first + panel;
  float* c[2] = {floats + 2 * panel, floats + 2 * panel + c_floats};
  const auto* x1 = (const uint16_t*)x.spare + item.token * 2 * x.stride;
  for (int part = 0; part <= (gated ? 1 : 0); ++part) {
    const Matrix& w = part == 0 ? job.w : job.up;
    for (int64_t k0 = 0; k0 < cols; k0 += kPanelDepth) {
      int64_t k = cols - k0 < kPanelDepth ? cols - k0 : kPanelDepth;
      amx_pack_split(w, row, n, k0, k, vecs, floats, first, second);
      Ahead ahead = packed_next(item, part, k0, next), nothing;
      auto add = [&](const uint16_t* a, const uint16_t* b, bool accumulate, Ahead& meanwhile) {
        multiply_panel<AmxTile>(a + k0, 2 * x.stride, item.tokens, b, vecs, k, c[part], kPanelRows, accumulate, meanwhile);
      };
      add(x1, first, k0 > 0, ahead);
      add(x1, second, true, nothing);
      add(x1 + x.stride, first, true, nothing);
    }
  }
  finish(job, item.token, item.tokens, row, n, c[0], c[1], kPanelRows);
}
#endif

}  // namespace
}  // namespace qwen15

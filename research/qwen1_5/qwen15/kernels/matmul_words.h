// Matmuls over many tokens with weights of 8 or 4 bits, multiplied as integers of 16 bits where the CPU has dot products
// of those.
//
//   y[t, r] = sum over segments s of x_scale[t, s] scale[r, s] sum_j (q[r, j] - zero[r, s]) words[t, j],  y float32
//
// Weights less their zero points are packed into panels as int16, which is exact; a segment of them lies in one group.
// Activations become int16 once a matmul, with a float32 scale for every kSegment columns: 1 part in 65534 of the
// largest, as when few tokens meet such weights (see matmul_quant.h). A dot product does two multiply-adds where one does
// float32 panels', which took twice the time.
#pragma once
#include "matmul_panels.h"
#include "matmul_quant.h"

namespace qwen15 {
namespace {

#ifdef QWEN15_VNNI
constexpr int64_t kWordsFrom = 32;  // tokens from which this pays
static_assert(kQuantBlock == 2 * W, "a block of columns is a vector of int16");

struct WordRow {};  // rows of a quantised matrix, packed as int16

// Where token t's words are in `Activations::spare`, and behind them its scales, one for every kSegment columns.
inline int16_t* words_of(const Activations& x, int64_t t) { return (int16_t*)((float*)x.spare + t * x.stride); }
inline float* scales_of(const Activations& x, int64_t t) { return (float*)(words_of(x, t) + x.stride); }

// x (tokens, cols) float32 -> x.spare. Every thread does its share of the tokens, and waits for the others.
inline void fill_words(Team& team, const Activations& x, int64_t tokens, int64_t cols) {
  int64_t first, last;
  team.share(tokens, 1, &first, &last);
  for (int64_t t = first; t < last; ++t)
    for (int64_t i = 0; i < cols; i += kSegment) {
      const float* from = (const float*)x.data + t * x.stride + i;
      scales_of(x, t)[i / kSegment] =
          segment_words(from, cols - i < kSegment ? cols - i : kSegment,
                        [&](int64_t j, V a, V b) { s_store(words_of(x, t) + i + j, a, b, i_zero()); });
    }
  team.barrier();
}

// Columns [k0, k0 + k) of `count` rows from `row` on -> panel[i / 2][r][i % 2] int16 and scales (segments, r) float32, r
// below vecs W; zeros where there is no row.
inline void pack_words(const Matrix& m, int64_t row, int count, int64_t k0, int64_t k, int64_t segment, int vecs,
                       int16_t* panel, float* scales) {
  const int64_t group = m.cols / m.groups, bytes = m.row_bytes(), stride = (int64_t)vecs * 2 * W;
  const bool nibbles = m.dtype == DType::q4;
  float scale[kPanelRows] = {0};
  S zero[kPanelRows];
  for (int64_t i = 0, known = -1; i < k; i += kQuantBlock) {
    const int64_t column = k0 + i, g = column / group;
    if (g != known)
      for (int r = 0; r < count; ++r) {
        int64_t at = (row + r) * m.groups + g;
        scale[r] = load_scalar(m.scale, at);
        zero[r] = s_set((int16_t)zero_point(m, at));
      }
    known = g;
    if (i % segment == 0) memcpy(scales + i / segment * vecs * W, scale, vecs * W * sizeof(float));
    const uint8_t* from = (const uint8_t*)m.data + row * bytes + (nibbles ? column / 2 : column);
    for (int v = 0; v < vecs; ++v) {
      V block[W];
      for (int r = 0; r < W; ++r) {
        const int n = v * W + r;
        const uint8_t* p = from + n * bytes;
        block[r] = n >= count ? v_zero() : s_floats(s_sub(nibbles ? s_load_nibbles(p) : s_load_bytes(p), zero[n]));
      }
      v_transpose(block);
      int16_t* to = panel + i / 2 * stride + v * 2 * W;
      for (int j = 0; j < W; ++j) memcpy(to + j * stride, &block[j], sizeof(V));
    }
  }
}

// c (M tokens, N vectors of rows) (+)= tokens from t on against a panel of k columns from k0 on
template <int M, int N>
__attribute__((noinline)) void word_tile(const Activations& x, int64_t t, int64_t k0, const int16_t* panel,
                                         const float* scales, int64_t k, int64_t segment, float* c, int64_t c_stride,
                                         bool accumulate) {
  const int64_t a_stride = 2 * x.stride;
  const int16_t* a = words_of(x, t) + k0;
  const float* a_scales = scales_of(x, t);
  for (int64_t s = 0; s < k; s += segment, scales += N * W) {
    I acc[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m][n] = i_zero();
    for (int64_t i = s; i < s + segment; i += 8) {
#pragma GCC unroll 4
      for (int j = 0; j < 8; j += 2, panel += N * 2 * W) {
        S w[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) w[n] = s_load(panel + n * 2 * W);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          S pair = s_repeat(a + m * a_stride + i + j);
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) acc[m][n] = i_madd(acc[m][n], w[n], pair);
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V unit = v_set(a_scales[m * x.stride + (k0 + s) / kSegment]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        float* at = c + m * c_stride + n * W;
        V y = v_mul(i_float(acc[m][n]), v_mul(v_load(scales + n * W), unit));
        v_store(at, accumulate ? v_add(v_load(at), y) : y);
      }
    }
    accumulate = true;
  }
}

// The same for any number of tokens, in groups of nearly the same size.
template <int N>
void word_rows(const Activations& x, int64_t t, int64_t tokens, int64_t k0, const int16_t* panel, const float* scales,
               int64_t k, int64_t segment, float* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
  int64_t groups = (tokens + kTileRows - 1) / kTileRows, share = (ahead.lines - ahead.at) / groups + 1;
  for (int64_t left = groups, m; left > 0; --left, t += m, tokens -= m, c += m * c_stride) {
    m = (tokens + left - 1) / left;
    ahead.fetch(share);
    auto* run = m == 1   ? word_tile<1, N>
                : m == 2 ? word_tile<2, N>
                : m == 3 ? word_tile<3, N>
                : m == 4 ? word_tile<4, N>
                : m == 5 ? word_tile<5, N>
                         : word_tile<6, N>;
    run(x, t, k0, panel, scales, k, segment, c, c_stride, accumulate);
  }
}

// x is what `fill_words` has made.
template <>
void one_panel<WordRow>(Team& team, const Item& item, const Item* next, Activations x) {
  static_assert(kTileRows == 6 && kTileVecs == 4, "the tiles there are");
  const Job& job = *item.job;
  const int64_t row = item.row, cols = job.w.cols, depth = cols < kPanelDepth ? cols : kPanelDepth;
  const int n = job.w.rows - row < kPanelRows ? (int)(job.w.rows - row) : (int)kPanelRows, vecs = (n + W - 1) / W;
  const bool gated = job.up.data != nullptr;
  const int64_t panel_bytes = depth * kPanelRows * 2, scale_floats = depth / kQuantBlock * kPanelRows;
  const int64_t c_floats = item.tokens * kPanelRows;
  auto* panel = (int16_t*)team.scratch(panel_bytes + (scale_floats + (gated ? 2 : 1) * c_floats) * sizeof(float));
  float *scales = (float*)((char*)panel + panel_bytes), *c[2] = {scales + scale_floats, scales + scale_floats + c_floats};
  auto* run = vecs == 1 ? word_rows<1> : vecs == 2 ? word_rows<2> : vecs == 3 ? word_rows<3> : word_rows<4>;
  for (int part = 0; part <= (gated ? 1 : 0); ++part) {
    const Matrix& w = part == 0 ? job.w : job.up;
    const int64_t segment = Cut(w).segment;
    for (int64_t k0 = 0; k0 < cols; k0 += kPanelDepth) {
      int64_t k = cols - k0 < kPanelDepth ? cols - k0 : kPanelDepth;
      pack_words(w, row, n, k0, k, segment, vecs, panel, scales);
      Ahead ahead = packed_next(item, part, k0, next);
      run(x, item.token, item.tokens, k0, panel, scales, k, segment, c[part], kPanelRows, k0 > 0, ahead);
    }
  }
  finish(job, item.token, item.tokens, row, n, c[0], c[1], kPanelRows);
}
#endif

}  // namespace
}  // namespace qwen15

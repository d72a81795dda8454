// Matmuls over many tokens: threads take panels of rows, pack one in their L2, and run register tiles over it.
#pragma once
#include "amx.h"
#include "matmul_finish.h"
#include "matmul_pack.h"
#include "team.h"

namespace qwen15 {
namespace {

constexpr int64_t kQuantPackFrom = 64;  // tokens from which packing pays for quantised weights
constexpr int64_t kTokenBlock = 512;  // tokens per packed panel

// One item of a matmul over many tokens: a panel of a job's rows against a block of tokens. `next` is the item after
// it, or null: its first rows are fetched meanwhile.
struct Item {
  const Job* job;
  int64_t row, token, tokens;
};

inline Ahead rows_ahead(const Matrix& w, int64_t row, int64_t k0) {
  int64_t count = w.rows - row < kPanelRows ? w.rows - row : kPanelRows, bytes = w.row_bytes();
  int64_t k = w.cols - k0 < kPanelDepth ? w.cols - k0 : kPanelDepth;
  return Ahead((const char*)w.data + row * bytes + bytes * k0 / w.cols, count, bytes, bytes * k / w.cols);
}

// What is packed after columns [k0, k0 + kPanelDepth) of an item's `part` (1: the second matrix of a gated job).
inline Ahead packed_next(const Item& item, int part, int64_t k0, const Item* next) {
  const Job& job = *item.job;
  if (k0 + kPanelDepth < job.w.cols) return rows_ahead(part == 0 ? job.w : job.up, item.row, k0 + kPanelDepth);
  if (part == 0 && job.up.data != nullptr) return rows_ahead(job.up, item.row, 0);
  return next != nullptr ? rows_ahead(next->job->w, next->row, 0) : Ahead();
}

// How the rows of a panel are packed, and the tile they are packed for.
template <class R>
struct Panels {
  typedef typename Packer<R>::Tile Tile;
  static void pack(const Matrix& m, int64_t row, int count, int64_t k0, int64_t k, int vecs, typename Tile::P* panel) {
    pack_rows<R>(m, row, count, k0, k, vecs, panel);
  }
};
#ifdef QWEN15_AMX
template <>
struct Panels<PairRow> {
  typedef AmxTile Tile;
  static void pack(const Matrix& m, int64_t row, int count, int64_t k0, int64_t k, int vecs, uint16_t* panel) {
    for (int v = 0; v < vecs; ++v) {
      int n = count - v * W < W ? count - v * W : W;
      pack_rows<PairRow>(m, row + v * W, n, k0, k, 1, panel + v * AmxTile::vector(k));
    }
  }
};
#endif

template <class R>
void one_panel(Team& team, const Item& item, const Item* next, Activations x) {
  typedef typename Panels<R>::Tile T;
  static_assert(kPanelRows <= kRowBlock, "finish() holds the bias of one panel");
  const Job& job = *item.job;
  int64_t row = item.row, cols = job.w.cols;
  int n = job.w.rows - row < kPanelRows ? (int)(job.w.rows - row) : (int)kPanelRows;
  int vecs = (n + W - 1) / W;
  bool gated = job.up.data != nullptr;
  int64_t depth = cols < kPanelDepth ? padded(cols) : kPanelDepth;
  int64_t panel_bytes = depth * kPanelRows * sizeof(typename T::P), c_bytes = item.tokens * kPanelRows * sizeof(float);
  char* memory = (char*)team.scratch(panel_bytes + (gated ? 2 : 1) * c_bytes);
  auto* panel = (typename T::P*)memory;
  float* c[2] = {(float*)(memory + panel_bytes), (float*)(memory + panel_bytes + c_bytes)};
  const auto* xs = (const typename T::A*)x.data + item.token * x.stride;
  for (int part = 0; part <= (gated ? 1 : 0); ++part) {
    const Matrix& w = part == 0 ? job.w : job.up;
    for (int64_t k0 = 0; k0 < cols; k0 += kPanelDepth) {
      int64_t k = cols - k0 < kPanelDepth ? cols - k0 : kPanelDepth;
      Panels<R>::pack(w, row, n, k0, k, vecs, panel);
      Ahead ahead = packed_next(item, part, k0, next);
      multiply_panel<T>(xs + k0, x.stride, item.tokens, panel, vecs, k, c[part], kPanelRows, k0 > 0, ahead);
    }
  }
  finish(job, item.token, item.tokens, row, n, c[0], c[1], kPanelRows);
}

int64_t panels(const Job& job) { return (job.w.rows + kPanelRows - 1) / kPanelRows; }

struct Items {
  const Job* jobs;
  int64_t per_block = 0, block = kTokenBlock, tokens, count;

  Items(const Job* all, int job_count, int64_t token_count, int threads) : jobs(all), tokens(token_count) {
    for (int j = 0; j < job_count; ++j) per_block += panels(jobs[j]);
    // Few panels for many threads: cut the tokens finer, at the price of packing more often.
    while (block > 8 * kTileRows && per_block * ((tokens + block - 1) / block) < 4 * threads) block /= 2;
    count = per_block * ((tokens + block - 1) / block);
  }
  Item operator[](int64_t i) const {
    int64_t token = i / per_block * block, panel = i % per_block;
    const Job* job = jobs;
    for (; panel >= panels(*job); ++job) panel -= panels(*job);
    return {job, panel * kPanelRows, token, tokens - token < block ? tokens - token : block};
  }
};

// The jobs' panels, for whichever thread is free.
template <class R>
void many_tokens(Team& team, const Job* jobs, int job_count, Activations x, int64_t tokens) {
  Items items(jobs, job_count, tokens, team.size());
  for (int64_t i = team.take(); i < items.count;) {
    int64_t after = team.take();
    Item next = items[after < items.count ? after : 0];
    one_panel<R>(team, items[i], after < items.count ? &next : nullptr, x);
    i = after;
  }
}

}  // namespace
}  // namespace qwen15

// Matmuls over some tokens, the activations packed.
//
// Weights stay as they are; the activations are packed, once per matmul and thread, so that no sums across a vector are
// needed at each row's end. A unit is what a 32-bit lane multiplies: one float, or a pair of bf16. A vector of the
// panel holds G units of each of W / G tokens; G units of a row are broadcast to meet it. The sums of a row and a token
// are then G lanes, added when the results of a block of rows are turned from (rows, tokens) to (tokens, rows).
//   panel (units / G, N vectors, W / G tokens, G units)
// N and G follow from the number of tokens: 2 vectors for each broadcast at least, or the loads are what limits (two
// tokens, whose weights take longer to arrive, fill one). A thread reads 8 rows side by side, so that the panel comes
// from L2 once for all of them, and asks for the next 8 meanwhile. They are asked into L2: in the first cache level they
// and the panel would put each other out, which made steps of 8 to 16 tokens take up to twice the time on Zen 4.
#pragma once
#include "matmul_few.h"
#include "matmul_tile.h"

namespace qwen15 {
namespace {

#ifdef QWEN15_REPEAT
constexpr int kWideRows = 8;          // rows at once, 8 to 24 accumulators
constexpr int64_t kWideFrom = 2;      // tokens from which this pays for bf16, and
constexpr int64_t kWideFromFloat = 5; // for float32, whose activations fill the first cache level sooner
constexpr int64_t kWideMost = 64;     // tokens that 4 vectors hold
constexpr int64_t kWideBytes = 1 << 18;  // of the panel: it stays in L2 beside the weights

// c (M rows, N vectors) (+)= w (M, k) panel, float32 products summed in parts of kSum. Meanwhile M lines for each line
// of a row are asked for from `ahead` on, in address order: `ahead_row` bytes between the lines of one step,
// `ahead_step` between steps.
template <class T, int M, int N, int G>
__attribute__((noinline)) void wide_tile(const typename T::A* w, int64_t stride, int64_t k, const typename T::P* panel,
                                         float* c, bool accumulate, const char* ahead, int64_t ahead_row,
                                         int64_t ahead_step) {
  constexpr int kLine = 64 / sizeof(typename T::A);
  int64_t i = 0, most = T::depth == 1 ? kSum : k;
  do {
    V acc[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = v_zero();
    int64_t end = k - i < most ? k : i + most;
    for (; i + kLine <= end; i += kLine, ahead += ahead_step) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) __builtin_prefetch(ahead + m * ahead_row, 0, 2);
#pragma GCC unroll 16
      for (int j = 0; j < kLine; j += G * T::depth) {
        V x[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) x[n] = T::load(panel + n * W * T::depth);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          V units = v_repeat<G>(w + m * stride + i + j);
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) acc[m][n] = T::mac(acc[m][n], x[n], units);
        }
        panel += N * W * T::depth;
      }
    }
    if (i < end) {  // the rest of the rows, with zeros after it as the panel has them
      typename T::A rest[M][kLine];
      memset(rest, 0, sizeof rest);
      for (int m = 0; m < M; ++m) memcpy(rest[m], w + m * stride + i, (end - i) * sizeof(typename T::A));
      for (int j = 0; j < kLine; j += G * T::depth) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          V units = v_repeat<G>(rest[m] + j);
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) acc[m][n] = T::mac(acc[m][n], T::load(panel + n * W * T::depth), units);
        }
        panel += N * W * T::depth;
      }
      i = end;
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        float* at = c + (m * N + n) * W;
        v_store(at, accumulate ? v_add(v_load(at), acc[m][n]) : acc[m][n]);
      }
    accumulate = true;
  } while (i < k);
}

// Activations of `tokens` tokens as a panel; rows of x are zero from `cols` up to whole lines.
template <class T, int N, int G>
void pack_tokens(const typename T::A* x, int64_t x_stride, int64_t tokens, int64_t cols, typename T::P* panel) {
  constexpr int kLine = 64 / sizeof(typename T::A), kUnit = G * T::depth, kTokens = W / G, kStep = N * W * T::depth;
  for (int n = 0; n < N; ++n) {
    int64_t first = n * kTokens, count = tokens - first < kTokens ? tokens - first : kTokens;
    const typename T::A* from = x + first * x_stride;
    typename T::P* to = panel + n * W * T::depth;
    for (int64_t i = 0; i < cols; i += kLine, to += kLine / kUnit * kStep) {
      V block[kTokens];
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) block[t] = t < count ? T::load(from + t * x_stride + i) : v_zero();
      v_transpose_units<G>(block);
#pragma GCC unroll 16
      for (int j = 0; j < kTokens; ++j) T::store(to + j * kStep, block[j]);
    }
  }
}

// y (tokens, kRowBlock) = the sums in c (rows, N vectors), rows a multiple of W
template <int N, int G>
void turn(const float* c, int64_t rows, int64_t tokens, float* y) {
  constexpr int kTokens = W / G;
  for (int64_t r = 0; r < rows; r += W)
    for (int n = 0; n < N; ++n) {
      V block[W];
#pragma GCC unroll 16
      for (int m = 0; m < W; ++m) block[m] = v_load(c + ((r + m) * N + n) * W);
      v_transpose(block);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        V sum = block[t * G];
#pragma GCC unroll 8
        for (int g = 1; g < G; ++g) sum = v_add(sum, block[t * G + g]);
        if (n * kTokens + t < tokens) v_store(y + (n * kTokens + t) * kRowBlock + r, sum);
      }
    }
}

// A thread's rows of a job.
struct WideRows {
  int64_t begin, end, blocks;

  WideRows(const Team& team, int owner, const Job& job) {
    team.share_of(owner, job.w.rows, W, &begin, &end);
    blocks = (end - begin + kRowBlock - 1) / kRowBlock;
  }
};

// Asks for the beginnings of the rows that this thread reads first, `bytes` of all together.
inline void ask_wide(const Team& team, const Job& job, int64_t bytes) {
  const WideRows share(team, team.rank(), job);
  const int64_t stride = job.w.row_bytes(), rows = share.end - share.begin < kWideRows ? share.end - share.begin : kWideRows;
  const char* w = (const char*)job.w.data + share.begin * stride;
  for (int64_t at = 0; at < bytes / kWideRows && at < stride; at += 64)
    for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(w + r * stride + at, 0, 3);
}

template <class T, int N, int G>
void wide_of(Team& team, const Job* jobs, int job_count, Activations x, int64_t tokens) {
  typedef typename T::A A;
  typedef typename T::P P;
  constexpr int kLine = 64 / sizeof(A), kRows = N < 4 ? kWideRows : kWideRows / 2;
  int64_t cols = jobs[0].w.cols, whole = round_up(cols, kLine);
  int64_t piece = kWideBytes / (N * W * 4) * T::depth * G / kLine * kLine;  // inputs taken at once
  if (piece > whole) piece = whole;
  int64_t c_floats = kRowBlock * N * W, y_floats = tokens * kRowBlock, panel_bytes = whole / (T::depth * G) * N * W * 4;
  char* memory = (char*)team.scratch(panel_bytes + (c_floats + 2 * y_floats) * sizeof(float));
  P* panel = (P*)memory;
  float* c = (float*)(memory + panel_bytes);
  float* y[2] = {c + c_floats, c + c_floats + y_floats};
  pack_tokens<T, N, G>((const A*)x.data, x.stride, tokens, cols, panel);
  auto rows_of = [&](const Job& job, int owner) { return WideRows(team, owner, job); };
  for_blocks(team, jobs, job_count, rows_of, [&](const Job& job, const WideRows& share, int64_t block) {
    bool gated = job.up.data != nullptr;
    int64_t row = share.begin + block * kRowBlock, rows = share.end - row < kRowBlock ? share.end - row : kRowBlock;
    for (int part = 0; part <= (gated ? 1 : 0); ++part) {
      const A* w = (const A*)(part == 0 ? job.w.data : job.up.data) + row * cols;
      const A* after = !gated ? w + rows * cols : part == 0 ? (const A*)job.up.data + row * cols
                                                            : (const A*)job.w.data + (row + rows) * cols;
      for (int64_t k0 = 0; k0 < cols; k0 += piece) {
        int64_t k = cols - k0 < piece ? cols - k0 : piece, m = 0;
        const P* columns = panel + k0 / (T::depth * G) * N * W * T::depth;
        bool all = k == cols;
        int64_t ahead_row = all ? 64 : cols * (int64_t)sizeof(A), ahead_step = all ? 64 * kRows : 64;
        for (; m + kRows <= rows; m += kRows) {
          const A* ahead = m + 2 * kRows <= rows ? w + (m + kRows) * cols + k0 : k0 + piece < cols ? w + k0 + piece : after;
          wide_tile<T, kRows, N, G>(w + m * cols + k0, cols, k, columns, c + m * N * W, k0 > 0, (const char*)ahead, ahead_row,
                                    ahead_step);
        }
        for (; m < rows; ++m)
          wide_tile<T, 1, N, G>(w + m * cols + k0, cols, k, columns, c + m * N * W, k0 > 0, (const char*)(w + (m + 1) * cols + k0),
                                64, 64);
      }
      turn<N, G>(c, round_up(rows, W), tokens, y[part]);
    }
    finish(job, 0, tokens, row, rows, y[0], y[1], kRowBlock);
  });
}

template <class T>
void wide(Team& team, const Job* jobs, int job_count, Activations x, int64_t tokens) {
  if (tokens <= 2) return wide_of<T, 1, 8>(team, jobs, job_count, x, tokens);
  if (tokens <= 6) return wide_of<T, 3, 8>(team, jobs, job_count, x, tokens);
  if (tokens <= 8) return wide_of<T, 2, 4>(team, jobs, job_count, x, tokens);
  if (tokens <= 12) return wide_of<T, 3, 4>(team, jobs, job_count, x, tokens);
  if (tokens <= 16) return wide_of<T, 2, 2>(team, jobs, job_count, x, tokens);
  if (tokens <= 24) return wide_of<T, 3, 2>(team, jobs, job_count, x, tokens);
  if (tokens <= 32) return wide_of<T, 2, 1>(team, jobs, job_count, x, tokens);
  if (tokens <= 48) return wide_of<T, 3, 1>(team, jobs, job_count, x, tokens);
  return wide_of<T, 4, 1>(team, jobs, job_count, x, tokens);
}
#endif

// Whether so many tokens take the way of packed activations.
inline bool is_wide(DType dtype, int64_t tokens) {
#ifdef QWEN15_REPEAT
  if (tokens > kWideMost) return false;
  if (dtype == DType::f32) return tokens >= kWideFromFloat;
#ifdef QWEN15_BF16_PAIRS
  if (dtype == DType::bf16) return tokens >= kWideFrom;
#endif
#endif
  (void)dtype, (void)tokens;
  return false;
}

}  // namespace
}  // namespace qwen15

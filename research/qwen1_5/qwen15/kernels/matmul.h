// y = x W^T for weights as the checkpoint stores them, row-major, never copied as a whole.
//
//   x (T, I) activations; W (O, I) f32/f16/bf16; y (T, O) float32; products accumulated in float32.
//   plain:  out = y + bias + residual      gated:  act = silu(x W^T) * (x U^T)
//
// Few tokens: each thread reads its rows at two places, each in address order, and a row meets up to kDotTokens tokens in
// registers. Some tokens: rows are broadcast against packed activations. Both take rows as they come from memory.
// Many tokens: threads take panels of 64 rows, pack one into [I][64] (bf16: [I/2][64][2]) in their L2, and run a register
// tile of kTileRows tokens x kTileVecs vectors over it, with the activations broadcast.
#pragma once

namespace {

constexpr int kRowBlock = 64;         // rows handed to the epilogue at a time when tokens are few
constexpr int64_t kAheadBytes = 4096; // distance at which a row's bytes are asked for when tokens are few
constexpr int64_t kDotBytes = 32768;  // bytes of activations at once then: they stay in the first cache level
constexpr int64_t kReusedRows = 8;    // rows at once when they meet several groups of tokens
constexpr int64_t kPackFrom = 64;     // tokens from which packing pays
constexpr int64_t kPanelDepth = 1024; // inputs per packed panel: 64 x 1024 x 2 bytes stay in L2
constexpr int64_t kTokenBlock = 512;  // tokens per packed panel
constexpr int64_t kSum = 128;         // float32 products in one sum: longer ones move a real model's logits by 4e-4

// ---------------------------------------------------------------- rows against few tokens

// One row against one vector, with four chains so that the latency of an addition does not show.
template <class R>
inline float dot(const typename R::E* w, int64_t cols, const typename R::X* x) {
  V acc0 = v_zero(), acc1 = v_zero(), acc2 = v_zero(), acc3 = v_zero();
  int64_t i = 0;
  for (; i + 4 * R::step <= cols; i += 4 * R::step) {
    acc0 = R::mac(acc0, R::load(w + i), x + i);
    acc1 = R::mac(acc1, R::load(w + i + R::step), x + i + R::step);
    acc2 = R::mac(acc2, R::load(w + i + 2 * R::step), x + i + 2 * R::step);
    acc3 = R::mac(acc3, R::load(w + i + 3 * R::step), x + i + 3 * R::step);
  }
  for (; i + R::step <= cols; i += R::step) acc0 = R::mac(acc0, R::load(w + i), x + i);
  if (i < cols) acc1 = R::mac(acc1, R::load_part(w + i, (int)(cols - i)), x + i);
  return v_sum(v_add(v_add(acc0, acc1), v_add(acc2, acc3)));
}

// Rows at P places of a matrix against N tokens: out[(p * tokens + t) * kRowBlock + r] (+)= w[p * apart + r] . x[t].
//
// Each place is read in address order. Two streams far apart keep more of the memory busy than one; rows that lie side by side
// would confuse the prefetcher. What the hardware's prefetcher misses is asked for `ahead` elements further on, past the caches,
// as weights are read once. `head` elements before w fill its first vector up, so that no load crosses a cache line: x has as
// many zeros in front, and those elements themselves are not looked at.
template <class R, int N, int P>
__attribute__((noinline)) void dot_places(const typename R::E* w, int64_t apart, int64_t stride, int64_t rows, int64_t cols,
                                          int head, const typename R::X* x, int64_t x_stride, float* out, int64_t tokens,
                                          bool accumulate, int64_t ahead) {
  constexpr int64_t kLine = 64 / sizeof(typename R::E);
  constexpr int kChains = N == 1 ? 2 : 1;  // an addition takes longer than a line to arrive
  constexpr int kSums = N * P;
  w -= head;
  cols += head;
  for (int64_t r = 0; r < rows; ++r, w += stride) {
    V acc[kChains][kSums];
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 32
      for (int j = 0; j < kSums; ++j) acc[c][j] = v_zero();
    int64_t i = 0;
#ifdef QWEN15_LOAD_REST
    if (head > 0) {
      typename R::L l[P];
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) l[p] = R::load_rest(w + p * apart, head);
#pragma GCC unroll 16
      for (int t = 0; t < N; ++t)
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) acc[0][t * P + p] = R::mac(acc[0][t * P + p], l[p], x + t * x_stride);
      i = R::step;
    }
#endif
    for (; i + kChains * kLine <= cols; i += kChains * kLine)
#pragma GCC unroll 2
      for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) __builtin_prefetch(w + p * apart + i + c * kLine + ahead, 0, 0);
#pragma GCC unroll 16
        for (int64_t at = i + c * kLine; at < i + (c + 1) * kLine; at += R::step) {
          typename R::L l[P];
#pragma GCC unroll 2
          for (int p = 0; p < P; ++p) l[p] = R::load(w + p * apart + at);
#pragma GCC unroll 16
          for (int t = 0; t < N; ++t)
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) acc[c][t * P + p] = R::mac(acc[c][t * P + p], l[p], x + t * x_stride + at);
        }
      }
    for (; i < cols; i += R::step) {
      int part = cols - i < R::step ? (int)(cols - i) : R::step;
      typename R::L l[P];
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) l[p] = part == R::step ? R::load(w + p * apart + i) : R::load_part(w + p * apart + i, part);
#pragma GCC unroll 16
      for (int t = 0; t < N; ++t)
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) acc[0][t * P + p] = R::mac(acc[0][t * P + p], l[p], x + t * x_stride + i);
    }
    float sums[round_up(kSums, 4)];
#pragma GCC unroll 32
    for (int j = 0; j < kSums; ++j)
      if (kChains == 2) acc[0][j] = v_add(acc[0][j], acc[kChains - 1][j]);
#pragma GCC unroll 8
    for (int j = 0; j < kSums; j += 4)
      v_sum4(acc[0][j], acc[0][j + 1 < kSums ? j + 1 : j], acc[0][j + 2 < kSums ? j + 2 : j], acc[0][j + 3 < kSums ? j + 3 : j],
             sums + j);
    for (int t = 0; t < N; ++t)
      for (int p = 0; p < P; ++p) {
        float* y = out + (p * tokens + t) * kRowBlock + r;
        *y = (accumulate ? *y : 0.0f) + sums[t * P + p];
      }
  }
}

// ---------------------------------------------------------------- packed panels and register tiles

// Panel element and how `kTileRows` activations meet it. Inputs come `depth` at a time.
struct FloatTile {
  typedef float A;  // activations
  typedef float P;  // panel
  static constexpr int depth = 1;
  static inline V load(const P* p) { return v_load(p); }
  static inline V broadcast(const A* a) { return v_set(*a); }
  static inline void store(P* p, V v) { v_store(p, v); }
  static inline V mac(V acc, V w, V a) { return v_fma(w, a, acc); }
};
#ifdef QWEN15_BF16_PAIRS
struct PairTile {
  typedef uint16_t A;
  typedef uint16_t P;
  static constexpr int depth = 2;
  static inline V load(const P* p) { return _mm512_loadu_ps(p); }
  static inline void store(P* p, V v) { _mm512_storeu_ps(p, v); }
  static inline V broadcast(const A* a) {
    int32_t pair;
    memcpy(&pair, a, sizeof pair);
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
  }
  static inline V mac(V acc, V w, V a) { return v_dot_pairs(acc, _mm512_castps_si512(w), _mm512_castps_si512(a)); }
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
    for (int64_t stop = k - i < most ? k : i + most; i < stop;) {
      // One cache line of every row at a time; the same lines of the rows after these are asked for meanwhile.
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) __builtin_prefetch(a + (M + m) * a_stride + i, 0, 2);
      for (int64_t end = stop - i < kLine ? stop : i + kLine; i < end; i += T::depth) {
        V w[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) w[n] = T::load(panel + n * W * T::depth);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          V x = T::broadcast(a + m * a_stride + i);
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) acc[m][n] = T::mac(acc[m][n], w[n], x);
        }
        panel += N * W * T::depth;
      }
    }
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

template <class T, int N>
void tile_rows(const typename T::A* a, int64_t a_stride, int64_t rows, const typename T::P* panel, int64_t k, float* c,
               int64_t c_stride, bool accumulate, Ahead& ahead) {
  int64_t m = 0, share = (ahead.lines - ahead.at) / (rows / kTileRows + 1) + 1;
  for (; m + kTileRows <= rows; m += kTileRows) {
    ahead.fetch(share);
    tile<T, kTileRows, N>(a + m * a_stride, a_stride, panel, k, c + m * c_stride, c_stride, accumulate);
  }
  ahead.fetch(ahead.lines);
  a += m * a_stride;
  c += m * c_stride;
  switch (rows - m) {
    case 5: return tile<T, (5 < kTileRows ? 5 : kTileRows), N>(a, a_stride, panel, k, c, c_stride, accumulate);
    case 4: return tile<T, (4 < kTileRows ? 4 : kTileRows), N>(a, a_stride, panel, k, c, c_stride, accumulate);
    case 3: return tile<T, 3, N>(a, a_stride, panel, k, c, c_stride, accumulate);
    case 2: return tile<T, 2, N>(a, a_stride, panel, k, c, c_stride, accumulate);
    case 1: return tile<T, 1, N>(a, a_stride, panel, k, c, c_stride, accumulate);
    default: return;
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

// ---------------------------------------------------------------- what happens to y

// c (tokens, n) -> the job's output, columns [row, row + n)
void finish(const Job& job, int64_t token, int64_t tokens, int64_t row, int64_t n, const float* c, const float* c_up,
            int64_t c_stride, bool round_bf16) {
  if (job.up.data != nullptr) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t j = 0; j < n; j += W) {
        int part = n - j < W ? (int)(n - j) : W;
        V gate = v_load_part(c + t * c_stride + j, part), up = v_load_part(c_up + t * c_stride + j, part);
        V y = v_mul(v_silu(gate), up);
        write_output(job.out, job.out_stride, job.act, token + t, row + j, y, part, round_bf16);
      }
    if (job.out == nullptr && row + n == job.w.rows)
      for (int64_t t = 0; t < tokens; ++t) clear_tail(job.act, token + t, job.w.rows);
    return;
  }
  float bias[kRowBlock];
  for (int64_t j = 0; j < n; j += W) {
    int part = n - j < W ? (int)(n - j) : W;
    v_store_part(bias + j, job.bias.data == nullptr ? v_zero()
                           : part == W             ? load_vector(job.bias, row + j)
                                                   : load_vector_part(job.bias, row + j, part), part);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    float* out = job.out + (token + t) * job.out_stride + row;
    const float* y = c + t * c_stride;
    const float* residual = job.residual == nullptr ? nullptr : job.residual + (token + t) * job.out_stride + row;
    int64_t j = 0;
    for (; j + W <= n; j += W) {
      V v = v_add(v_load(y + j), v_load(bias + j));
      v_store(out + j, residual == nullptr ? v : v_add(v, v_load(residual + j)));
    }
    for (; j < n; ++j) out[j] = y[j] + bias[j] + (residual == nullptr ? 0.0f : residual[j]);
  }
}

// ---------------------------------------------------------------- few tokens

// Elements from a gated job's first matrix to its second one when a row of each can be read side by side, 0 otherwise: then both
// begin at the same place of a cache line, as far as that matters (see Shifted).
inline int64_t pair_distance(const Job& job, int64_t tokens) {
  int64_t bytes = (int64_t)((uintptr_t)job.up.data - (uintptr_t)job.w.data), item = dtype_bytes(job.w.dtype);
  return job.up.data == nullptr || bytes % (tokens == 1 ? item : 64) != 0 ? 0 : bytes / item;
}

// One thread's rows [begin, end) of a job in blocks of up to kRowBlock rows at each of two places: `apart` rows from each other
// in the same matrix, where the second may have fewer rows than the first, or the same rows of both matrices of a gated job.
struct Places {
  int64_t begin, end, apart, blocks;

  Places(const Team& team, int rank, const Job& job, int64_t tokens) {
    team.share_of(rank, job.w.rows, W, &begin, &end);
    apart = pair_distance(job, tokens) != 0 ? end - begin : round_up((end - begin + 1) / 2, W);
    blocks = (apart + kRowBlock - 1) / kRowBlock;
  }
  int64_t rows(int64_t block, int place) const {
    int64_t from = begin + place * apart + block * kRowBlock, stop = begin + (place + 1) * apart;
    if (stop > end) stop = end;
    return from >= stop ? 0 : stop - from < kRowBlock ? stop - from : kRowBlock;
  }
};

// Activations for one matrix: as they are, or a copy of them with `head` zeros before every row; see dot_places.
template <class R>
struct Shifted {
  typedef typename R::X X;
  const void* matrix = nullptr;
  int head = 0;
  X* data;
  int64_t stride;

  static int64_t padded_cols(int64_t cols) { return padded(cols) + 32; }
  static int64_t bytes(int64_t cols, int64_t tokens) { return tokens * padded_cols(cols) * (int64_t)sizeof(X); }

  void meet(const void* w, int64_t cols, Activations x, int64_t tokens, void* memory) {
    if (matrix == w) return;
    matrix = w;
    data = (X*)x.data;
    stride = x.stride;
    head = 0;
#ifdef QWEN15_LOAD_REST
    constexpr uintptr_t kElement = sizeof(typename R::E), kVector = R::step * kElement;
    uintptr_t past = (uintptr_t)w % kVector;
    if (tokens == 1) return;  // then a load of w that crosses lines hides behind the memory
    if (past % kElement != 0 || cols * kElement % kVector != 0) return;  // every row begins elsewhere in a line
    head = (int)(past / kElement);
    if (head == 0) return;
    data = (X*)memory;
    stride = padded_cols(cols);
    for (int64_t t = 0; t < tokens; ++t) {
      memset(data + t * stride, 0, head * sizeof(X));
      memcpy(data + t * stride + head, (const X*)x.data + t * x.stride, cols * sizeof(X));
      memset(data + t * stride + head + cols, 0, (stride - head - cols) * sizeof(X));
    }
#else
    (void)cols, (void)tokens, (void)memory;
#endif
  }
};

template <class R, int P>
void dot_group(const typename R::E* w, int64_t apart, int64_t stride, int64_t rows, int64_t cols, int head,
               const typename R::X* x, int64_t x_stride, int64_t group, float* out, int64_t tokens, bool accumulate,
               int64_t ahead) {
  switch (group) {
#define QWEN15_CASE(N)                                                                                                      \
  case N:                                                                                                                   \
    return dot_places<R, (N <= kDotTokens ? N : 1), P>(w, apart, stride, rows, cols, head, x, x_stride, out, tokens, accumulate, \
                                                       ahead);
    QWEN15_CASE(1)
    QWEN15_CASE(2)
    QWEN15_CASE(3)
    QWEN15_CASE(4)
    QWEN15_CASE(5)
    QWEN15_CASE(6)
    QWEN15_CASE(7)
    QWEN15_CASE(8)
    QWEN15_CASE(9)
    QWEN15_CASE(10)
    QWEN15_CASE(11)
    QWEN15_CASE(12)
#undef QWEN15_CASE
  }
}

// `rows` rows at each of P places against all tokens, out (P, tokens, kRowBlock). Tokens go in groups of nearly equal size and
// long rows in pieces, so that the activations in use stay in the first cache level and sums stay short. The weights come from
// memory for the first group and from the caches for the others; hence few rows at a time then.
template <class R, int P>
void dot_block(const typename R::E* w, int64_t apart, int64_t rows, int64_t cols, const Shifted<R>& x, int64_t tokens, float* out) {
  int64_t groups = (tokens + kDotTokens - 1) / kDotTokens, most = (tokens + groups - 1) / groups;
  int64_t pieces = (cols * most * (int64_t)sizeof(typename R::X) + kDotBytes - 1) / kDotBytes, longest = kSum * R::step;
  if (pieces * longest < cols) pieces = (cols + longest - 1) / longest;
  int64_t piece = round_up((cols + pieces - 1) / pieces, 64), step = groups == 1 ? rows : kReusedRows;
  for (int64_t r = 0; r < rows; r += step) {
    int64_t n = rows - r < step ? rows - r : step;
    for (int64_t k = 0; k < cols; k += piece) {
      int64_t depth = cols - k < piece ? cols - k : piece;
      int64_t ahead = kAheadBytes / (depth * (int64_t)sizeof(typename R::E));  // whole rows: a piece ends before its row does
      for (int64_t t = 0, left = groups; left > 0; --left) {
        int64_t group = (tokens - t + left - 1) / left;
        dot_group<R, P>(w + r * cols + k, apart, cols, n, depth, x.head, x.data + t * x.stride + k, x.stride, group,
                        out + t * kRowBlock + r, tokens, k > 0, t > 0 ? 0 : ahead > 1 ? ahead * cols : cols);
        t += group;
      }
    }
  }
}

// One block of one matrix of a job: out (2, tokens, kRowBlock).
template <class R>
void few_rows(const void* matrix, int64_t cols, const Places& places, int64_t block, const Shifted<R>& x, int64_t tokens,
              float* out) {
  const auto* w = (const typename R::E*)matrix + (places.begin + block * kRowBlock) * cols;
  int64_t first = places.rows(block, 0), both = places.rows(block, 1);
  if (both > 0) dot_block<R, 2>(w, places.apart * cols, both, cols, x, tokens, out);
  if (first > both) dot_block<R, 1>(w + both * cols, 0, first - both, cols, x, tokens, out + both);
}

// Calls f(job, share, block) for this thread's blocks of every job in order, then for what others have not begun yet: two cores
// seldom get the same share of the memory's bandwidth, and the faster one would wait at every matrix. share_of(job, owner) is a
// thread's rows of a job, cut into `blocks`.
template <class Share, class F>
void for_blocks(Team& team, const Job* jobs, int job_count, Share share_of, F f) {
  for (int i = 0; i < team.size(); ++i) {
    int owner = (team.rank() + i) % team.size();
    int64_t before = 0, block = team.take_of(owner);
    for (int j = 0; j < job_count; ++j) {
      const auto share = share_of(jobs[j], owner);
      for (; block - before < share.blocks; block = team.take_of(owner)) f(jobs[j], share, block - before);
      before += share.blocks;
    }
  }
}

template <class R>
void few_tokens(Team& team, const Job* jobs, int job_count, Activations x, int64_t tokens, bool round_bf16) {
  int64_t cols = jobs[0].w.cols, sums = tokens * kRowBlock, x_bytes = round_up(Shifted<R>::bytes(cols, tokens), 64);
  char* memory = (char*)team.scratch(2 * x_bytes + 4 * sums * sizeof(float));
  float *c = (float*)(memory + 2 * x_bytes), *c_up = c + 2 * sums;
  Shifted<R> shifted, shifted_up;
  auto places_of = [&](const Job& job, int owner) { return Places(team, owner, job, tokens); };
  for_blocks(team, jobs, job_count, places_of, [&](const Job& job, const Places& places, int64_t block) {
    shifted.meet(job.w.data, cols, x, tokens, memory);
    if (int64_t distance = pair_distance(job, tokens); distance != 0) {
      int64_t row = places.begin + block * kRowBlock, n = places.rows(block, 0);
      dot_block<R, 2>((const typename R::E*)job.w.data + row * cols, distance, n, cols, shifted, tokens, c);
      return finish(job, 0, tokens, row, n, c, c + sums, kRowBlock, round_bf16);
    }
    few_rows<R>(job.w.data, cols, places, block, shifted, tokens, c);
    if (job.up.data != nullptr) {
      shifted_up.meet(job.up.data, cols, x, tokens, memory + x_bytes);
      few_rows<R>(job.up.data, cols, places, block, shifted_up, tokens, c_up);
    }
    for (int p = 0; p < 2; ++p)
      if (int64_t n = places.rows(block, p); n > 0)
        finish(job, 0, tokens, places.begin + p * places.apart + block * kRowBlock, n, c + p * sums, c_up + p * sums, kRowBlock,
               round_bf16);
  });
}

#ifdef QWEN15_REPEAT
// ---------------------------------------------------------------- rows against some tokens, the activations packed
//
// Weights stay as they are; the activations are packed, once per matmul and thread, so that no sums across a vector are
// needed at each row's end. A unit is what a 32-bit lane multiplies: one float, or a pair of bf16. A vector of the panel
// holds G units of each of W / G tokens; G units of a row are broadcast to meet it. The sums of a row and a token are then G
// lanes, added when the results of a block of rows are turned from (rows, tokens) to (tokens, rows).
//   panel (units / G, N vectors, W / G tokens, G units)
// N and G follow from the number of tokens: 2 vectors for each broadcast at least, or the loads are what limits.

constexpr int kWideRows = 8;          // rows at once, 16 to 24 accumulators
constexpr int64_t kWideFrom = 8;      // tokens from which this pays for bf16, and
constexpr int64_t kWideFromFloat = 5; // for float32, whose activations fill the first cache level sooner
constexpr int64_t kWideMost = 64;     // tokens that 4 vectors hold
constexpr int64_t kWideBytes = 1 << 18;  // of the panel: it stays in L2 beside the weights

// c (M rows, N vectors) (+)= w (M, k) panel, float32 products summed in parts of kSum. Meanwhile M lines for each line of
// a row are asked for from `ahead` on, in address order: `ahead_row` bytes between the lines of one step, `ahead_step`
// between steps.
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
      for (int m = 0; m < M; ++m) __builtin_prefetch(ahead + m * ahead_row, 0, 3);
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

template <class T, int N, int G>
void wide_of(Team& team, const Job* jobs, int job_count, Activations x, int64_t tokens, bool round_bf16) {
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
  struct Rows {
    int64_t begin, end, blocks;
  };
  auto rows_of = [&](const Job& job, int owner) {
    Rows share;
    team.share_of(owner, job.w.rows, W, &share.begin, &share.end);
    share.blocks = (share.end - share.begin + kRowBlock - 1) / kRowBlock;
    return share;
  };
  for_blocks(team, jobs, job_count, rows_of, [&](const Job& job, const Rows& share, int64_t block) {
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
    finish(job, 0, tokens, row, rows, y[0], y[1], kRowBlock, round_bf16);
  });
}

template <class T>
void wide(Team& team, const Job* jobs, int job_count, Activations x, int64_t tokens, bool round_bf16) {
  if (tokens <= 8) return wide_of<T, 2, 4>(team, jobs, job_count, x, tokens, round_bf16);
  if (tokens <= 12) return wide_of<T, 3, 4>(team, jobs, job_count, x, tokens, round_bf16);
  if (tokens <= 16) return wide_of<T, 2, 2>(team, jobs, job_count, x, tokens, round_bf16);
  if (tokens <= 24) return wide_of<T, 3, 2>(team, jobs, job_count, x, tokens, round_bf16);
  if (tokens <= 32) return wide_of<T, 2, 1>(team, jobs, job_count, x, tokens, round_bf16);
  if (tokens <= 48) return wide_of<T, 3, 1>(team, jobs, job_count, x, tokens, round_bf16);
  return wide_of<T, 4, 1>(team, jobs, job_count, x, tokens, round_bf16);
}
#endif

// One item of a matmul over many tokens: a panel of a job's rows against a block of tokens. `next` is the item after it,
// or null: its first rows are fetched meanwhile.
struct Item {
  const Job* job;
  int64_t row, token, tokens;
};

constexpr int64_t kPanelRows = kTileVecs * W;

template <class R>
Ahead rows_ahead(const Job& job, const void* w, int64_t row, int64_t k0) {
  int64_t cols = job.w.cols, count = job.w.rows - row < kPanelRows ? job.w.rows - row : kPanelRows;
  int64_t k = cols - k0 < kPanelDepth ? cols - k0 : kPanelDepth, size = sizeof(typename R::E);
  return Ahead((const typename R::E*)w + row * cols + k0, count, cols * size, k * size);
}

template <class R>
void one_panel(Team& team, const Item& item, const Item* next, Activations x, bool round_bf16) {
  typedef typename Packer<R>::Tile T;
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
    const void* source = part == 0 ? job.w.data : job.up.data;
    const auto* w = (const typename R::E*)source;
    for (int64_t k0 = 0; k0 < cols; k0 += kPanelDepth) {
      int64_t k = cols - k0 < kPanelDepth ? cols - k0 : kPanelDepth;
      const typename R::E* rows[kPanelRows];
      for (int r = 0; r < n; ++r) rows[r] = w + (row + r) * cols + k0;
      Packer<R>::pack(rows, n, k, vecs, panel);
      Ahead ahead;
      if (k0 + kPanelDepth < cols) ahead = rows_ahead<R>(job, source, row, k0 + kPanelDepth);
      else if (part == 0 && gated) ahead = rows_ahead<R>(job, job.up.data, row, 0);
      else if (next != nullptr) ahead = rows_ahead<R>(*next->job, next->job->w.data, next->row, 0);
      multiply_panel<T>(xs + k0, x.stride, item.tokens, panel, vecs, k, c[part], kPanelRows, k0 > 0, ahead);
    }
  }
  finish(job, item.token, item.tokens, row, n, c[0], c[1], kPanelRows, round_bf16);
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

// Asks memory for what this thread reads first in a matmul that begins with `job` when tokens are few: called before the barrier
// in front of it, while others still prepare the activations, it hides the time until the first weights arrive.
void ask(Team& team, const Job& job, int64_t tokens) {
  if (tokens >= kPackFrom || is_wide(job.w.dtype, tokens)) return;
  Places places(team, team.rank(), job, tokens);
  int64_t row_bytes = job.w.cols * dtype_bytes(job.w.dtype), most = (places.end - places.begin) * row_bytes;
  int64_t paired = pair_distance(job, tokens) * dtype_bytes(job.w.dtype);
  const char* w = (const char*)job.w.data + places.begin * row_bytes;
  for (int64_t at = 0; at < kAheadBytes && at < most; at += 64) {
    __builtin_prefetch(w + at, 0, 3);
    __builtin_prefetch(w + (paired != 0 ? paired : places.apart * row_bytes) + at, 0, 3);
  }
}

void matmul(Team& team, const Job* jobs, int job_count, Activations x, int64_t tokens) {
  DType dtype = jobs[0].w.dtype;  // of all jobs
#ifdef QWEN15_REPEAT
  if (is_wide(dtype, tokens)) {
#ifdef QWEN15_BF16_PAIRS
    if (dtype == DType::bf16) return wide<PairTile>(team, jobs, job_count, x, tokens, true);
#endif
    return wide<FloatTile>(team, jobs, job_count, x, tokens, false);
  }
#endif
  if (tokens < kPackFrom) {
    if (dtype == DType::f32) return few_tokens<F32Row>(team, jobs, job_count, x, tokens, false);
    if (dtype == DType::f16) return few_tokens<F16Row>(team, jobs, job_count, x, tokens, false);
    return few_tokens<PairRow>(team, jobs, job_count, x, tokens, true);
  }
  Items items(jobs, job_count, tokens, team.size());
  for (int64_t i = team.take(); i < items.count;) {
    int64_t after = team.take();
    Item item = items[i], next = items[after < items.count ? after : 0];
    const Item* coming = after < items.count ? &next : nullptr;
    if (item.job->w.dtype == DType::f32) one_panel<F32Row>(team, item, coming, x, false);
    else if (item.job->w.dtype == DType::f16) one_panel<F16Row>(team, item, coming, x, false);
    else one_panel<PairRow>(team, item, coming, x, true);
    i = after;
  }
}

}  // namespace

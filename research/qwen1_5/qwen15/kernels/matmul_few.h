// Matmuls over few tokens: each thread reads its rows at two places, each in address order, as they come from memory.
#pragma once
#include "matmul_dot.h"
#include "matmul_finish.h"
#include "team.h"

namespace qwen15 {
namespace {

constexpr int64_t kDotBytes = 32768;  // bytes of activations at once then: they stay in the first cache level
constexpr int64_t kReusedRows = 8;    // rows at once when they meet several groups of tokens
constexpr int64_t kSplitFrom = 7;     // tokens from which a SplitRow pays; with fewer the memory is what limits
constexpr int64_t kPackFrom = 64;     // tokens from which packing pays

// Elements from a gated job's first matrix to its second one when a row of each can be read side by side, 0 otherwise:
// then both begin at the same place of a cache line, as far as that matters (see Shifted).
inline int64_t pair_distance(const Job& job, int64_t tokens) {
  int64_t bytes = (int64_t)((uintptr_t)job.up.data - (uintptr_t)job.w.data), item = dtype_bytes(job.w.dtype);
  return job.up.data == nullptr || bytes % (tokens == 1 ? item : 64) != 0 ? 0 : bytes / item;
}

// Whether a gated job's two matrices are quantised in the same way.
inline bool are_cut_alike(const Job& job) {
  return job.up.data != nullptr && job.w.dtype == job.up.dtype && job.w.groups == job.up.groups &&
         (job.w.zero == nullptr) == (job.up.zero == nullptr);
}

// One thread's rows [begin, end) of a job in blocks of up to kRowBlock rows at each of two places: `apart` rows from
// each other in the same matrix, where the second may have fewer rows than the first, or the same rows of both matrices
// of a gated job. Where reading goes at one place, the second has no rows.
struct Places {
  int64_t begin, end, apart, blocks;
  bool side_by_side;  // rows of both matrices

  Places(const Team& team, int rank, const Job& job, int64_t tokens) {
    team.share_of(rank, job.w.rows, W, &begin, &end);
    int wanted = reading().places;
    side_by_side = wanted == 2 && (is_quantised(job.w.dtype) ? are_cut_alike(job) : pair_distance(job, tokens) != 0);
    apart = side_by_side || wanted == 1 ? end - begin : round_up((end - begin + 1) / 2, W);
    blocks = (apart + kRowBlock - 1) / kRowBlock;
  }
  int64_t rows(int64_t block, int place) const {
    int64_t from = begin + place * apart + block * kRowBlock, stop = begin + (place + 1) * apart;
    if (stop > end) stop = end;
    return from >= stop ? 0 : stop - from < kRowBlock ? stop - from : kRowBlock;
  }
};

// Activations for one matrix: as they are, or a copy of them with `head` zeros before every row (see dot_places), or in
// the order in which a row's parts meet them.
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
    if (R::parts == 2) return split(x, cols, tokens, memory);
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

 private:
  void split(Activations x, int64_t cols, int64_t tokens, void* memory) {
#ifdef QWEN15_SPLIT
    data = (X*)memory;
    stride = padded_cols(cols);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < cols; i += 2 * W) {
        V v[2] = {v_load((const float*)x.data + t * x.stride + i), v_load((const float*)x.data + t * x.stride + i + W)};
        v_split(v);
        v_store((float*)data + t * stride + i, v[0]);
        v_store((float*)data + t * stride + i + W, v[1]);
      }
#else
    (void)x, (void)cols, (void)tokens, (void)memory;
#endif
  }
};

template <class R, int P>
void dot_group(const typename R::E* w, int64_t apart, int64_t stride, int64_t rows, int64_t cols, int head,
               const typename R::X* x, int64_t x_stride, int64_t group, float* out, int64_t tokens, bool accumulate,
               Asking asking) {
  switch (group) {
#define QWEN15_CASE(N)                                                                                                      \
  case N:                                                                                                                   \
    return dot_places<R, (N <= kDotTokens ? N : 1), P>(w, apart, stride, rows, cols, head, x, x_stride, out, tokens, accumulate, \
                                                       asking);
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

// `rows` rows at each of P places against all tokens, out (P, tokens, kRowBlock). Tokens that fit into one group meet
// whole rows, as they come from memory. More go in groups of nearly equal size: the weights come from memory for the first
// group and from the caches for the others, hence few rows at a time then, and pieces of them, so that the activations in
// use stay in the first cache level. Meanwhile the next piece is asked for, a part of it by each group.
template <class R, int P>
void dot_block(const typename R::E* w, int64_t apart, int64_t rows, int64_t cols, const Shifted<R>& x, int64_t tokens, float* out) {
  constexpr int64_t kItem = sizeof(typename R::E);
  const Reading way = reading();
  const int64_t groups = (tokens + kDotTokens - 1) / kDotTokens;
  Asking asking;
  asking.near = way.hint == 3;
  asking.stride = cols * kItem;
  asking.groups = groups;
  auto ask = [&](const typename R::E* here, const typename R::E* next, int64_t count) {
    asking.bytes = count * kItem;
    asking.met = 0;
    for (int p = 0; p < P; ++p) asking.next[p] = (const char*)((way.hint == 0 ? here : next) + p * apart);
  };
  if (groups == 1) {
    ask(w, w + way.ahead / kItem, cols);
    return dot_group<R, P>(w, apart, cols, rows, cols, x.head, x.data, x.stride, tokens, out, tokens, false, asking);
  }
  const int64_t most = (tokens + groups - 1) / groups, longest = kSum * R::step / R::parts;
  int64_t pieces = (cols * most * (int64_t)sizeof(typename R::X) + kDotBytes - 1) / kDotBytes;
  if (pieces * longest < cols) pieces = (cols + longest - 1) / longest;
  const int64_t piece = round_up((cols + pieces - 1) / pieces, 64);
  for (int64_t r = 0; r < rows; r += kReusedRows) {
    const int64_t n = rows - r < kReusedRows ? rows - r : kReusedRows;
    for (int64_t k = 0; k < cols; k += piece) {
      const int64_t depth = cols - k < piece ? cols - k : piece;
      const auto* here = w + r * cols + k;
      ask(here, k + piece < cols ? here + piece : w + (r + n) * cols, depth);
      for (int64_t t = 0, left = groups; left > 0; --left) {
        int64_t group = (tokens - t + left - 1) / left;
        dot_group<R, P>(here, apart, cols, n, depth, x.head, x.data + t * x.stride + k, x.stride, group,
                        out + t * kRowBlock + r, tokens, k > 0, asking);
        asking.met += n;
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

// Calls f(job, share, block) for this thread's blocks of every job in order, then for what others have not begun yet:
// two cores seldom get the same share of the memory's bandwidth, and the faster one would wait at every matrix.
// share_of(job, owner) is a thread's rows of a job, cut into `blocks`.
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
void few_tokens(Team& team, const Job* jobs, int job_count, Activations x, int64_t tokens) {
  int64_t cols = jobs[0].w.cols, sums = tokens * kRowBlock, x_bytes = round_up(Shifted<R>::bytes(cols, tokens), 64);
  char* memory = (char*)team.scratch(2 * x_bytes + 4 * sums * sizeof(float));
  float *c = (float*)(memory + 2 * x_bytes), *c_up = c + 2 * sums;
  Shifted<R> shifted, shifted_up;
  auto places_of = [&](const Job& job, int owner) { return Places(team, owner, job, tokens); };
  for_blocks(team, jobs, job_count, places_of, [&](const Job& job, const Places& places, int64_t block) {
    shifted.meet(job.w.data, cols, x, tokens, memory);
    if (places.side_by_side) {
      int64_t distance = pair_distance(job, tokens);
      int64_t row = places.begin + block * kRowBlock, n = places.rows(block, 0);
      dot_block<R, 2>((const typename R::E*)job.w.data + row * cols, distance, n, cols, shifted, tokens, c);
      return finish(job, 0, tokens, row, n, c, c + sums, kRowBlock);
    }
    few_rows<R>(job.w.data, cols, places, block, shifted, tokens, c);
    if (job.up.data != nullptr) {
      shifted_up.meet(job.up.data, cols, x, tokens, memory + x_bytes);
      few_rows<R>(job.up.data, cols, places, block, shifted_up, tokens, c_up);
    }
    for (int p = 0; p < 2; ++p)
      if (int64_t n = places.rows(block, p); n > 0)
        finish(job, 0, tokens, places.begin + p * places.apart + block * kRowBlock, n, c + p * sums, c_up + p * sums, kRowBlock);
  });
}

}  // namespace
}  // namespace qwen15

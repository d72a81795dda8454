// Rows of weights against few tokens, in registers.
//
//   w (rows, cols) f32/f16/bf16 row-major; x (N, cols) as the row's trait wants it; sums in float32
#pragma once
#include "reading.h"
#include "rows.h"

namespace qwen15 {
namespace {

constexpr int kAskedTokens = 8;       // up to which the hint matters; a choice in the loop would cost 15 % at 11
constexpr int kRowBlock = 64;         // rows handed to the epilogue at a time when tokens are few
constexpr int64_t kSum = 128;         // float32 products in one sum: longer ones move a real model's logits by 4e-4

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

// acc[t * P + p] += what was loaded at P places against the same columns of N tokens, each vector of which is loaded
// once.
template <class R, int N, int P>
inline void meet_tokens(V* acc, const typename R::L* l, const typename R::X* x, int64_t x_stride) {
#pragma GCC unroll 2
  for (int i = 0; i < R::parts; ++i) {
    decltype(R::part(l[0], 0)) w[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) w[p] = R::part(l[p], i);
#pragma GCC unroll 16
    for (int t = 0; t < N; ++t) {
      auto columns = R::x_part(x + t * x_stride, i);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) acc[t * P + p] = R::meet(acc[t * P + p], w[p], columns);
    }
  }
}

// Rows at P places of a matrix against N tokens: out[(p * tokens + t) * kRowBlock + r] (+)= w[p * apart + r] . x[t].
//
// Each place is read in address order; a sum ends after kSum products, and its row goes on with the next. Two streams far
// apart keep more of the memory busy than one; rows that lie side by side would confuse the prefetcher. What the hardware's
// prefetcher misses is asked for as `asking` says.
// `head` elements before w fill its first vector up, so that no load crosses a cache line: x has as many zeros in front,
// and those elements themselves are not looked at.
template <class R, int N, int P>
__attribute__((noinline)) void dot_places(const typename R::E* w, int64_t apart, int64_t stride, int64_t rows, int64_t cols,
                                          int head, const typename R::X* x, int64_t x_stride, float* out, int64_t tokens,
                                          bool accumulate, Asking asking) {
  constexpr int64_t kLine = 64 / sizeof(typename R::E);
  constexpr int kChains = N == 1 ? 2 : 1;  // an addition takes longer than a line to arrive
  constexpr int kSums = N * P;
  constexpr int64_t kLongest = kSum * R::step / R::parts;
  const int64_t step = asking.step();
  w -= head;
  cols += head;
  for (int64_t r = 0; r < rows; ++r, w += stride) {
    const char* asked[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) asked[p] = asking.begin(p, r);
    float sums[round_up(kSums, 4)] = {0};
    for (int64_t i = 0, stop = 0; stop < cols;) {
      stop = cols - i < kLongest ? cols : i + kLongest;
      V acc[kChains][kSums];
#pragma GCC unroll 2
      for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 32
        for (int j = 0; j < kSums; ++j) acc[c][j] = v_zero();
#ifdef QWEN15_LOAD_REST
      if (i == 0 && head > 0) {
        typename R::L l[P];
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) l[p] = R::load_rest(w + p * apart, head);
        meet_tokens<R, N, P>(acc[0], l, x, x_stride);
        i = R::step;
      }
#endif
      for (; i + kChains * kLine <= stop; i += kChains * kLine)
#pragma GCC unroll 2
        for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 2
          for (int p = 0; p < P; ++p) {
            if (N <= kAskedTokens) asking.line(asked[p]);
            else __builtin_prefetch(asked[p], 0, 1);  // bound by its arithmetic
            asked[p] += step;
          }
#pragma GCC unroll 16
          for (int64_t at = i + c * kLine; at < i + (c + 1) * kLine; at += R::step) {
            typename R::L l[P];
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) l[p] = R::load(w + p * apart + at);
            meet_tokens<R, N, P>(acc[c], l, x + at, x_stride);
          }
        }
      for (; stop == cols && i < cols; i += R::step) {
        int part = cols - i < R::step ? (int)(cols - i) : R::step;
        typename R::L l[P];
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) l[p] = part == R::step ? R::load(w + p * apart + i) : R::load_part(w + p * apart + i, part);
        meet_tokens<R, N, P>(acc[0], l, x + i, x_stride);
      }
#pragma GCC unroll 32
      for (int j = 0; j < kSums; ++j)
        if (kChains == 2) acc[0][j] = v_add(acc[0][j], acc[kChains - 1][j]);
#pragma GCC unroll 8
      for (int j = 0; j < kSums; j += 4) {
        float four[4];
        v_sum4(acc[0][j], acc[0][j + 1 < kSums ? j + 1 : j], acc[0][j + 2 < kSums ? j + 2 : j], acc[0][j + 3 < kSums ? j + 3 : j],
               four);
        for (int m = 0; m < 4; ++m) sums[j + m] += four[m];
      }
    }
    for (int t = 0; t < N; ++t)
      for (int p = 0; p < P; ++p) {
        float* y = out + (p * tokens + t) * kRowBlock + r;
        *y = (accumulate ? *y : 0.0f) + sums[t * P + p];
      }
  }
}

}  // namespace
}  // namespace qwen15

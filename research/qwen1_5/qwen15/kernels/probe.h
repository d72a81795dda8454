// How fast this instruction set can read memory and multiply at all: what the bench holds the kernels against.
#pragma once
#include "rows.h"

namespace qwen15 {
namespace {

// Reads every byte, in `Streams` parts that advance side by side, and adds them up in 64-bit words. One part is read in
// address order with lines asked for 2 KB ahead; which of the patterns is fastest differs from machine to machine.
template <int Streams>
uint64_t read_streams(const char* p, int64_t bytes) {
  typedef uint64_t Q __attribute__((vector_size(W * 4)));
  constexpr int64_t step = 256;  // bytes of one part at a time
  constexpr int words = step / sizeof(Q);
  Q sums[4] = {{0}, {0}, {0}, {0}};
  int64_t part = bytes / Streams / step * step;
  for (int64_t i = 0; i < part; i += step)
#pragma GCC unroll 8
    for (int s = 0; s < Streams; ++s) {
      const char* from = p + s * part + i;
      if (Streams == 1)
        for (int64_t line = 0; line < step; line += 64) __builtin_prefetch(from + 2048 + line, 0, 3);
#pragma GCC unroll 16
      for (int j = 0; j < words; ++j) {
        Q w;  // one vector at a time: GCC would take a larger copy through the stack, in halves that wait for each other
        memcpy(&w, from + j * sizeof w, sizeof w);
        sums[j % 4] += w;
      }
    }
  Q all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  uint64_t sum = 0;
  for (unsigned i = 0; i < sizeof(Q) / 8; ++i) sum += all[i];
  return sum;
}

uint64_t read_bytes(const void* data, int64_t bytes, bool split) {
  return split ? read_streams<8>((const char*)data, bytes) : read_streams<1>((const char*)data, bytes);
}

inline V multiply_add(V acc, V a, V b) { return v_fma(a, b, acc); }
#ifdef QWEN15_BF16_PAIRS
inline V multiply_add(V acc, B a, B b) { return v_dot_pairs(acc, a, b); }
#endif

// As many independent chains as prefill's register tile has, on operands that never leave their registers.
template <class L>
float run_chains(int64_t repeats, L a, L b) {
  constexpr int chains = kTileRows * kTileVecs;
  V acc[chains];
#pragma GCC unroll 32
  for (int c = 0; c < chains; ++c) acc[c] = v_set((float)c);  // different, or the compiler would keep one of them
  for (int64_t i = 0; i < repeats; ++i)
#pragma GCC unroll 32
    for (int c = 0; c < chains; ++c) acc[c] = multiply_add(acc[c], a, b);
  V sum = v_zero();
#pragma GCC unroll 32
  for (int c = 0; c < chains; ++c) sum = v_add(sum, acc[c]);
  return v_sum(sum);
}

// Runs `repeats` rounds of multiply-adds as prefill does them for weights of this dtype; returns the operations done.
double peak_flops(int64_t repeats, DType dtype) {
  double per_round = 2.0 * kTileRows * kTileVecs * W;
  volatile float sink;
#ifdef QWEN15_BF16_PAIRS
  if (dtype == DType::bf16) {
    const uint16_t pair[2] = {0x3f80, 0x3f80};
    B ones = b_repeat(pair);
    sink = run_chains(repeats, ones, ones);
    (void)sink;
    return 2.0 * repeats * per_round;
  }
#endif
  (void)dtype;
  sink = run_chains(repeats, v_set(1.0f), v_set(1.0f));
  (void)sink;
  return repeats * per_round;
}

}  // namespace
}  // namespace qwen15

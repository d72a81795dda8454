// Passes over logits float32 that selecting the next token is built on: over one row (V,), or the columns just made.
#pragma once
#include "rows.h"

namespace qwen15 {
namespace {

// The largest of p (n,), n > 0; `clean` becomes false when one is NaN.
inline float highest(const float* p, int64_t n, bool* clean) {
  V high = v_set(-__builtin_inff());
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    V x = v_load(p + i);
    *clean &= !v_any_nan(x);
    high = v_max(high, x);
  }
  float top = v_highest(high);
  for (; i < n; ++i) {
    *clean &= p[i] == p[i];
    top = p[i] > top ? p[i] : top;
  }
  return top;
}

// `best` meets y (n,), the columns from `column` on.
inline void meet_columns(Largest* best, const float* y, int64_t n, int64_t column) {
  bool clean = true;
  float top = highest(y, n, &clean);
  if (!clean) return meet(best, top, Largest::kNaN);
  if (top < best->value) return;
  int64_t i = 0;
  while (y[i] != top) ++i;
  meet(best, top, (int32_t)(column + i));
}

// maxima[c] = largest of logits[256 c : 256 (c + 1)]; false when a logit is NaN.
bool chunk_maxima(const float* logits, int64_t n, float* maxima) {
  bool clean = true;
  for (int64_t c = 0; c * kLogitChunk < n; ++c) {
    const float* p = logits + c * kLogitChunk;
    int64_t count = n - c * kLogitChunk < kLogitChunk ? n - c * kLogitChunk : kLogitChunk;
    maxima[c] = highest(p, count, &clean);
  }
  return clean;
}

// sum_i exp((logits[i] - top) / temperature), in double from float32 lanes chunk by chunk
double sum_exp(const float* logits, int64_t n, float inverse_temperature, float top) {
  double sum = 0.0;
  V scale = v_set(inverse_temperature), shift = v_set(top);
  for (int64_t c = 0; c < n; c += kLogitChunk) {
    int64_t end = n - c < kLogitChunk ? n : c + kLogitChunk, i = c;
    V total = v_zero();
    for (; i + W <= end; i += W) total = v_add(total, v_exp(v_mul(v_sub(v_load(logits + i), shift), scale)));
    sum += v_sum(total);
    for (; i < end; ++i) sum += __builtin_exp((double)(logits[i] - top) * inverse_temperature);
  }
  return sum;
}

}  // namespace
}  // namespace qwen15

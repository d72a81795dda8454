// y = x W^T for weights as the checkpoint stores them, row-major, never copied as a whole.
//
//   x (T, I) activations; W (O, I) f32/f16/bf16 or quantised; y (T, O) float32; products accumulated in float32.
//   plain:  out = y + bias + residual      gated:  act = silu(x W^T) * (x U^T)
//
// Few tokens (matmul_few.h): each thread reads its rows at two places, each in address order, and a row meets up to
// kDotTokens tokens in registers. Some tokens (matmul_wide.h): rows are broadcast against packed activations. Both take
// rows as they come from memory. Many tokens (matmul_panels.h): threads take panels of rows, pack one into [I][64]
// (bf16: [I/2][64][2]) in their L2, and run a register tile over it, with the activations broadcast. Quantised weights meet
// few tokens as integers (matmul_quant.h), and many where the CPU has dot products for it (matmul_words.h).
#pragma once
#include "matmul_few.h"
#include "matmul_panels.h"
#include "matmul_quant.h"
#include "matmul_wide.h"
#include "matmul_words.h"

namespace qwen15 {
namespace {

// Tokens from which weights of a dtype are packed into panels.
inline int64_t panels_from(DType dtype) { return is_quantised(dtype) ? kQuantPackFrom : kPackFrom; }

// Asks memory for what this thread reads first in a matmul that begins with `job` when tokens are few: called before the
// barrier in front of it, while others still prepare the activations, it hides the time until the first weights arrive.
void ask(Team& team, const Job& job, int64_t tokens) {
  if (tokens >= panels_from(job.w.dtype)) return;
  const Reading way = reading();
  if (way.hint == 0) return;
#ifdef QWEN15_REPEAT
  if (is_wide(job.w.dtype, tokens)) return ask_wide(team, job, way.ahead);
#endif
  Places places(team, team.rank(), job, tokens);
  int64_t row_bytes = job.w.row_bytes(), most = (places.end - places.begin) * row_bytes;
  const char* w = (const char*)job.w.data + places.begin * row_bytes;
  const char* second = places.side_by_side                  ? (const char*)job.up.data + places.begin * row_bytes
                       : places.apart < places.end - places.begin ? w + places.apart * row_bytes
                                                                  : w;
  for (int64_t at = 0; at < way.ahead && at < most; at += 64) {
    __builtin_prefetch(w + at, 0, 3);
    __builtin_prefetch(second + at, 0, 3);
  }
}

void matmul(Team& team, const Job* jobs, int job_count, Activations x, int64_t tokens) {
  DType dtype = jobs[0].w.dtype;
  if (is_quantised(dtype)) {
#ifdef QWEN15_VNNI
    if (x.spare != nullptr && !x.exact) {
      fill_words(team, x, tokens, jobs[0].w.cols);
      return many_tokens<WordRow>(team, jobs, job_count, x, tokens);
    }
#endif
    if (tokens < kQuantPackFrom) return few_quantised(team, jobs, job_count, x, tokens);
    return many_tokens<QuantRow>(team, jobs, job_count, x, tokens);
  }
#ifdef QWEN15_REPEAT
  if (is_wide(dtype, tokens)) {
#ifdef QWEN15_BF16_PAIRS
    if (dtype == DType::bf16) return wide<PairTile>(team, jobs, job_count, x, tokens);
#endif
    return wide<FloatTile>(team, jobs, job_count, x, tokens);
  }
#endif
  if (tokens < kPackFrom) {
    if (dtype == DType::f32) return few_tokens<F32Row>(team, jobs, job_count, x, tokens);
    if (dtype == DType::f16) return few_tokens<F16Row>(team, jobs, job_count, x, tokens);
    if (tokens < kSplitFrom) return few_tokens<PairRow>(team, jobs, job_count, x, tokens);
    return few_tokens<SplitRow>(team, jobs, job_count, x, tokens);
  }
  if (dtype == DType::f32) return many_tokens<F32Row>(team, jobs, job_count, x, tokens);
  if (dtype == DType::f16) return many_tokens<F16Row>(team, jobs, job_count, x, tokens);
  many_tokens<PairRow>(team, jobs, job_count, x, tokens);
}

}  // namespace
}  // namespace qwen15

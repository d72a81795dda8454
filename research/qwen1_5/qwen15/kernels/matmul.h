// y = x W^T for weights as the checkpoint stores them, row-major, never copied as a whole.
//
//   x (T, I) activations; W (O, I) f32/f16/bf16; y (T, O) float32; products accumulated in float32.
//   plain:  out = y + bias + residual      gated:  act = silu(x W^T) * (x U^T)
//
// Few tokens (matmul_few.h): each thread reads its rows at two places, each in address order, and a row meets up to
// kDotTokens tokens in registers. Some tokens (matmul_wide.h): rows are broadcast against packed activations. Both take
// rows as they come from memory. Many tokens (matmul_panels.h): threads take panels of rows, pack one into [I][64]
// (bf16: [I/2][64][2]) in their L2, and run a register tile over it, with the activations broadcast.
#pragma once
#include "matmul_few.h"
#include "matmul_panels.h"
#include "matmul_wide.h"

namespace qwen15 {
namespace {

// Asks memory for what this thread reads first in a matmul that begins with `job` when tokens are few: called before
// the barrier in front of it, while others still prepare the activations, it hides the time until the first weights
// arrive.
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
}  // namespace qwen15

// The kernels for AMX's tiles of bf16: those for AVX-512 with bf16 dot products, but for matmuls of bf16 and of quantised
// weights over more than a few tokens, and for attention over a bf16 cache.
#define QWEN15_AVX512 1
#define QWEN15_BF16_PAIRS 1
#define QWEN15_VNNI 1
#define QWEN15_AMX 1
#include "attention.h"
#include "matmul_amx.h"

namespace qwen15 {
namespace {

constexpr int64_t kQuantTilesFrom = 32;  // tokens from which quantised weights are multiplied in tiles

void matmul_on_tiles(Team& team, const Job* jobs, int job_count, Activations x, int64_t tokens) {
  DType dtype = jobs[0].w.dtype;
  if (x.spare != nullptr && tokens >= kQuantTilesFrom) {
    amx_split(team, x, tokens, jobs[0].w.cols);
    many_tokens<QuantRow>(team, jobs, job_count, x, tokens);
  } else if (dtype == DType::bf16 && tokens > kAmxMost) {
    many_tokens<PairRow>(team, jobs, job_count, x, tokens);
  } else if (dtype == DType::bf16 && tokens >= kAmxFrom) {
    amx_batch(team, jobs, job_count, x, tokens);
  } else {
    return kernels_avx512_bf16.matmul(team, jobs, job_count, x, tokens);
  }
  amx_release();
}

void attention_on_tiles(Team& team, const float* q, int64_t q_stride, int64_t heads, const Cache& cache, const Batch& batch,
                        float* out, Activations act, AttentionScratch& scratch) {
  if (cache.dtype != DType::bf16)
    return kernels_avx512_bf16.attention(team, q, q_stride, heads, cache, batch, out, act, scratch);
  attention_of<PairRow>(team, q, q_stride, heads, cache, batch, out, act, scratch);
  amx_release();
}

// Runs `repeats` rounds of multiply-adds as prefill does them for weights of this dtype; returns the operations done.
double peak_flops(int64_t repeats, DType dtype) {
  return dtype == DType::bf16 ? amx_peak_flops(repeats) : kernels_avx512_bf16.peak_flops(repeats, dtype);
}

// A constant: code of this file that ran when the library is loaded would end the process on an older CPU.
constexpr Kernels on_tiles() {
  Kernels own = {};
  own.name = "amx";
  own.bf16_pairs = true;
  own.spare_from = kQuantTilesFrom;
  own.matmul = matmul_on_tiles;
  own.attention = attention_on_tiles;
  own.peak_flops = peak_flops;
  return own;
}

}  // namespace

extern const Kernels kernels_amx = on_tiles();
}  // namespace qwen15

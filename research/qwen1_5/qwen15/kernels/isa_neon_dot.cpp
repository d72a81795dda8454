// The kernels for NEON with dot products of bytes (from Kunpeng 920, Neoverse N1 on): those for NEON, but for matmuls of few
// tokens with weights of 8 or 4 bits.
#define QWEN15_NEON 1
#define QWEN15_DOT_BYTES 1
#include "matmul_panels.h"
#include "matmul_quant.h"

namespace qwen15 {
namespace {

void matmul_by_bytes(Team& team, const Job* jobs, int job_count, Activations x, int64_t tokens) {
  if (is_quantised(jobs[0].w.dtype) && tokens < kQuantPackFrom) return few_quantised(team, jobs, job_count, x, tokens);
  kernels_neon.matmul(team, jobs, job_count, x, tokens);
}

// A constant: code of this file that ran when the library is loaded would end the process on an older CPU.
constexpr Kernels by_bytes() {
  Kernels own = {};
  own.name = "neon_dot";
  own.spare_from = INT64_MAX;
  own.matmul = matmul_by_bytes;
  return own;
}

}  // namespace

extern const Kernels kernels_neon_dot = by_bytes();
}  // namespace qwen15

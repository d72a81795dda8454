// The kernels for AVX-512 with bf16 dot products.
#include <stdint.h>

#include "vec_avx512.h"

#include "isa.h"

namespace qwen15 {
extern const Kernels kernels_avx512_bf16 = {"avx512_bf16",    true,     rmsnorm,      prepare, matmul,     ask,      rope_and_cache,
                                  attention, embed,    chunk_maxima, sum_exp, read_bytes, peak_flops};
}  // namespace qwen15

// The kernels for AVX-512 (F, BW, VL, DQ).
#include <stdint.h>

#include "vec_avx512.h"

#include "isa.h"

namespace qwen15 {
extern const Kernels kernels_avx512 = {"avx512",    false,     rmsnorm,      prepare, matmul,     ask,      rope_and_cache,
                                  attention, embed,    chunk_maxima, sum_exp, read_bytes, peak_flops};
}  // namespace qwen15

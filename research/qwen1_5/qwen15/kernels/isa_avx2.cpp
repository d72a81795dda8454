// The kernels for AVX2 with FMA and F16C.
#include <stdint.h>

#include "vec_avx2.h"

#include "isa.h"

namespace qwen15 {
extern const Kernels kernels_avx2 = {"avx2",    false,     rmsnorm,      prepare, matmul,     ask,      rope_and_cache,
                                  attention, embed,    chunk_maxima, sum_exp, read_bytes, peak_flops};
}  // namespace qwen15

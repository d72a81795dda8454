// The kernels for any CPU.
#include <stdint.h>

#include "vec_portable.h"

#include "isa.h"

namespace qwen15 {
extern const Kernels kernels_portable = {"portable",    false,     rmsnorm,      prepare, matmul,     ask,      rope_and_cache,
                                  attention, embed,    chunk_maxima, sum_exp, read_bytes, peak_flops};
}  // namespace qwen15

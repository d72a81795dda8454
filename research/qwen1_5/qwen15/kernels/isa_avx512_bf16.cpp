// The kernels for AVX-512 with bf16 dot products.
#include "isa.h"

namespace qwen15 {
extern const Kernels kernels_avx512_bf16 = kernels_named("avx512_bf16");
}  // namespace qwen15

// The kernels for AVX-512 with bf16 dot products and VNNI.
#define QWEN15_AVX512 1
#define QWEN15_BF16_PAIRS 1
#define QWEN15_VNNI 1
#include "isa.h"

namespace qwen15 {
extern const Kernels kernels_avx512_bf16 = kernels_named("avx512_bf16");
}  // namespace qwen15

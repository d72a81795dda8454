// The kernels for NEON with dot products of bf16 and of bytes (from Neoverse V1 and N2 on).
#define QWEN15_NEON 1
#define QWEN15_BF16_PAIRS 1
#define QWEN15_DOT_BYTES 1
#include "isa.h"

namespace qwen15 {
extern const Kernels kernels_neon_bf16 = kernels_named("neon_bf16");
}  // namespace qwen15

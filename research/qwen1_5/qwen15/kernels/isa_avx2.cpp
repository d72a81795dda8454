// The kernels for AVX2 with FMA and F16C.
#define QWEN15_AVX2 1
#include "isa.h"

namespace qwen15 {
extern const Kernels kernels_avx2 = kernels_named("avx2");
}  // namespace qwen15

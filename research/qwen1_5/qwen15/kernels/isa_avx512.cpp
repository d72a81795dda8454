// The kernels for AVX-512.
#define QWEN15_AVX512 1
#include "isa.h"

namespace qwen15 {
extern const Kernels kernels_avx512 = kernels_named("avx512");
}  // namespace qwen15

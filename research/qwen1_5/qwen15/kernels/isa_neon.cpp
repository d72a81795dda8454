// The kernels for ARM's NEON, which every 64-bit ARM CPU has.
#define QWEN15_NEON 1
#include "isa.h"

namespace qwen15 {
extern const Kernels kernels_neon = kernels_named("neon");
}  // namespace qwen15

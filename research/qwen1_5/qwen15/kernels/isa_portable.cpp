// The kernels for any CPU.
#define QWEN15_PORTABLE 1
#include "isa.h"

namespace qwen15 {
extern const Kernels kernels_portable = kernels_named("portable");
}  // namespace qwen15

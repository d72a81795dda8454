// The kernels for any CPU.
#include "isa.h"

namespace qwen15 {
extern const Kernels kernels_portable = kernels_named("portable");
}  // namespace qwen15

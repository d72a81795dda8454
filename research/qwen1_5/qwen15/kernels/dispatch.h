// Which instruction set's kernels run: the best this CPU has, or the one QWEN15_KERNELS names.
#pragma once
#include "types.h"

namespace qwen15 {

// The kernels in use. Chosen at the first call; QWEN15_KERNELS is read then.
const Kernels& kernels();
// Use the kernels called `name`; false when this library or this CPU does not have them.
bool use_kernels(const char* name);
// Whether this library holds kernels called `name` and this CPU can run them.
bool can_run(const char* name);

}  // namespace qwen15

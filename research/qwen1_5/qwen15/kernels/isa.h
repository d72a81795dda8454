// One instruction set's kernels: included by each isa_*.cpp after its vectors, compiled with that file's own flags.
// Everything lives in unnamed namespaces and no standard C++ header is used, so that no function compiled for a newer
// CPU can be picked by the linker for an older one.
#pragma once
#include <stdint.h>
#include <string.h>

#include "team.h"
#include "types.h"

namespace qwen15 {
#include "rows.h"
// The order matters: each builds on those above it.
#include "elementwise.h"
#include "matmul.h"
#include "attention.h"
#include "select.h"
#include "probe.h"
}  // namespace qwen15

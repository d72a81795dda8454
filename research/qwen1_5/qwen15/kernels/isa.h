// One instruction set's kernels: included by each isa_*.cpp, which is compiled with that set's flags.
//
// Everything lives in unnamed namespaces and no standard C++ header is used, so that no function compiled for a newer
// CPU can be picked by the linker for an older one.
#pragma once
#include "attention.h"
#include "elementwise.h"
#include "matmul.h"
#include "probe.h"
#include "select.h"

namespace qwen15 {
namespace {

constexpr Kernels kernels_named(const char* name) {
#ifdef QWEN15_BF16_PAIRS
  constexpr bool bf16_pairs = true;
#else
  constexpr bool bf16_pairs = false;
#endif
#ifdef QWEN15_VNNI
  constexpr int64_t spare_from = kWordsFrom;
#else
  constexpr int64_t spare_from = INT64_MAX;
#endif
  return {name,      bf16_pairs, spare_from, rmsnorm, prepare,      matmul,  ask,        rope_and_cache,
          attention, gather,     combine, embed,   chunk_maxima, sum_exp, read_bytes, peak_flops};
}

}  // namespace
}  // namespace qwen15

// The vectors of the instruction set that the file which includes this is for (see isa_*.cpp); any CPU's where it names
// none.
#pragma once

#if defined(QWEN15_AVX512)
#include "vec_avx512.h"
#elif defined(QWEN15_NEON)
#include "vec_neon.h"
#elif defined(QWEN15_AVX2)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

// The vectors of the instruction set that this file is compiled for; QWEN15_PORTABLE asks for the plain ones.
#pragma once

#if !defined(QWEN15_PORTABLE) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__)
#include "vec_avx512.h"
#elif !defined(QWEN15_PORTABLE) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

// The vector ops of the row this unit is compiled for.
#pragma once
#if defined(ZS_ROW_avx512) || defined(ZS_ROW_avx512bf16) || defined(ZS_ROW_amx)
#include "simd/avx512.h"
#elif defined(ZS_ROW_avx2)
#include "simd/avx2.h"
#else
#include "simd/scalar.h"
#endif

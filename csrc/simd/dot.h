// Integer products of the row this unit is compiled for: unsigned codes of weights times signed bytes of activations.
//
// A panel's codes lie as [inputs/4][16 rows][4 inputs] bytes, so a 32-bit lane is one row and four inputs; of int4 two
// such vectors share their bytes, the earlier in the low nibbles. An activation is broadcast to all lanes. Every
// simd/dot_<isa>.h offers
//   i32, set_i32, to_f32          kLanes sums
//   store_i8                      kLanes integral floats within [-127, 127], as bytes
//   kPairs<values>                whether the activations come as 16-bit pairs (x0 x2, x1 x3), not as bytes (x0..x3)
//   dot_int8, dot_int4            32 inputs of a panel times kTokens activations, exact
#pragma once
#include "core.h"
#include "simd/simd.h"

namespace {
namespace simd {

constexpr int kPanelVectors = zs::kPanel / kLanes;

}  // namespace simd
}  // namespace

#if defined(ZS_ROW_avx512) || defined(ZS_ROW_avx512bf16) || defined(ZS_ROW_amx)
#include "simd/dot_avx512.h"
#elif defined(ZS_ROW_avx2)
#include "simd/dot_avx2.h"
#else
#include "simd/dot_scalar.h"
#endif

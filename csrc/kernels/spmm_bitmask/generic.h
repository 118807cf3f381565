#include "kernels/spmm_bitmask/integers.h"
#include "kernels/spmm_bitmask/vector.h"
#include "panel/table.h"

using zs::Values;

ZS_KERNELS(ZS_ENTRY(bitmask, fp32, vector::geometry, vector::pack<float>, vector::run<float>),
           ZS_ENTRY(bitmask, bf16, vector::geometry, vector::pack<uint16_t>, vector::run<uint16_t>),
           ZS_ENTRY(bitmask, int8, integers::geometry, integers::pack<Values::int8>, integers::run<Values::int8>),
           ZS_ENTRY(bitmask, int4, integers::geometry, integers::pack<Values::int4>, integers::run<Values::int4>),
           ZS_END_OF_TABLE)

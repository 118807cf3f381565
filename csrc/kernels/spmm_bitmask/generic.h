#include "kernels/spmm_bitmask/panels.h"
#include "kernels/spmm_bitmask/vector.h"
#include "panel/table.h"

using zs::Values;

ZS_KERNELS(ZS_ENTRY(bitmask, fp32, vector::geometry, vector::pack<float>, vector::run<float>),
           ZS_ENTRY(bitmask, bf16, vector::geometry, vector::pack<uint16_t>, vector::run<uint16_t>),
           ZS_ENTRY(bitmask, int8, integers::geometry, integers::pack<Values::int8>, integers::run<Values::int8>),
           ZS_ENTRY(bitmask, int4, integers::geometry, integers::pack<Values::int4>, integers::run<Values::int4>),
           ZS_SECOND(panels, bitmask, int8, panels::geometry<Values::int8>, panels::pack<Values::int8>,
                     panels::run<Values::int8>),
           ZS_SECOND(panels, bitmask, int4, panels::geometry<Values::int4>, panels::pack<Values::int4>,
                     panels::run<Values::int4>),
           ZS_END_OF_TABLE)

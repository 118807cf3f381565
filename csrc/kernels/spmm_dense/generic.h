#include "kernels/spmm_dense/integers.h"
#include "kernels/spmm_dense/vector.h"
#include "panel/table.h"

using zs::Values;

ZS_KERNELS(ZS_ENTRY(dense, fp32, vector::geometry, vector::pack, vector::run<Values::fp32>),
           ZS_ENTRY(dense, bf16, vector::geometry, vector::pack, vector::run<Values::bf16>),
           ZS_ENTRY(dense, int8, integers::geometry<Values::int8>, integers::pack<Values::int8>,
                    integers::run<Values::int8>),
           ZS_ENTRY(dense, int4, integers::geometry<Values::int4>, integers::pack<Values::int4>,
                    integers::run<Values::int4>),
           ZS_END_OF_TABLE)

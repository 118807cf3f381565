#include "kernels/spmm_dense/vector.h"
#include "panel/table.h"

ZS_KERNELS(ZS_ENTRY(dense, fp32, vector::geometry, vector::pack, vector::run<zs::Values::fp32>),
           ZS_ENTRY(dense, bf16, vector::geometry, vector::pack, vector::run<zs::Values::bf16>), ZS_END_OF_TABLE)

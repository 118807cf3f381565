#include "kernels/spmm_strip_nm/vector.h"
#include "panel/table.h"

ZS_KERNELS(ZS_ENTRY(strip_nm, fp32, vector::geometry, vector::pack, vector::run<zs::Values::fp32>),
           ZS_ENTRY(strip_nm, bf16, vector::geometry, vector::pack, vector::run<zs::Values::bf16>), ZS_END_OF_TABLE)

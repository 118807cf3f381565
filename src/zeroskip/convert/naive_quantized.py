"""int-quantized, float-quantized and naive-quantized of compressed-tensors: one byte a weight, scales beside.

    P.weight             I8, F8_E4M3 or F8_E5M2 [out, in]
    P.weight_scale       [out, in / group_size], [out, 1], [out / rows, in / columns] or one number
    P.weight_zero_point  of the same shape, where codes are not symmetric

Source: the compressed-tensors library, release 0.14.0.1.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from zeroskip.convert.base import Format, Parts, Stored, later
from zeroskip.convert.integers import check_grid, dequantize, keep_scales, spread

__all__ = ["NaiveQuantized"]

CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


class NaiveQuantized(Format):
    name = "naive-quantized"

    def read(self, stored: Stored) -> int:
        count = 0
        for prefix, parts in stored.families("weight_scale", ("weight",), ("weight_zero_point",)):
            codes, scale, name = parts["weight"], parts["weight_scale"], f"{prefix}.weight_scale"
            zero = parts.get("weight_zero_point")
            if codes.dtype not in CODES or len(codes.shape) != 2:
                kind = f"{codes.dtype} {list(codes.shape)}"
                raise stored.bad(f"{prefix}.weight", f"{kind} has scales beside it, but is not int8 or fp8 [out, in]")
            if not scale.dtype.is_floating_point or scale.dtype.itemsize < 2:
                raise stored.bad(name, f"scales of {scale.dtype} are not read")
            if zero is not None and zero.shape != scale.shape:
                raise stored.bad(f"{prefix}.weight_zero_point", f"{list(zero.shape)} beside scales {list(scale.shape)}")
            grid = check_grid(stored, name, scale.shape, codes.shape)
            make = partial(_dense, parts, codes.shape, grid)
            stored.put(f"{prefix}.weight", later(scale, codes.shape, make), name)
            if codes.dtype == torch.int8:
                keep_scales(stored, prefix, scale.make(), grid, codes.shape)
            count += 1
        return count


def _dense(parts: Parts, shape: tuple[int, ...], grid: tuple[int, int]) -> Tensor:
    zero = parts["weight_zero_point"].make() if "weight_zero_point" in parts else None
    scale = spread(parts["weight_scale"].make(), grid, shape)
    return dequantize(parts["weight"].make(), scale, None if zero is None else spread(zero, grid, shape))

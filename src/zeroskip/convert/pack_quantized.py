"""pack-quantized of compressed-tensors: codes of 1 to 8 bits in 32-bit words, with scales for groups of inputs.

    P.weight_packed      I32 [out, words] code + 2^(b-1), the first input in the lowest bits
    P.weight_scale       [out, in / group_size], [out, 1] or one number
    P.weight_shape       two whole numbers
    P.weight_zero_point  packed in the same way along the rows, where codes are not symmetric
    P.weight_g_idx       [in] the group of every input, where it is not the next ones

A weight is (code - zero point) * scale, computed in the type of the scales.

Widths that do not divide 32 have had two layouts: 32 // b codes in each word and the rest of it empty, and from June
2026 on one stream of bits, in which a code may begin in one word and end in the next. The width of the tensor tells
them apart from some 150 inputs on; where it does not, and they differ, nothing is guessed.

Source: the compressed-tensors library, release 0.14.0.1; for the stream, release 0.20.0.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from zeroskip.convert.base import Format, Parts, Stored, later, shape_in
from zeroskip.convert.integers import check_grid, dequantize, keep_scales, schemes, spread, unpack_words, words_for

__all__ = ["PackQuantized"]

WIDTHS = (4, 8, 2, 1, 3, 5, 6, 7)


class PackQuantized(Format):
    name = "pack-quantized"

    def read(self, stored: Stored) -> int:
        count = 0
        needs, may = ("weight_scale", "weight_shape"), ("weight_zero_point", "weight_g_idx")
        for prefix, parts in stored.families("weight_packed", needs, may):
            shape = shape_in(stored, f"{prefix}.weight_shape", parts["weight_shape"], 2)
            bits, stream = _layout(stored, prefix, parts, shape)
            scale = parts["weight_scale"]
            name = f"{prefix}.weight_scale"
            if not scale.dtype.is_floating_point or scale.dtype.itemsize < 2:
                raise stored.bad(name, f"scales of {scale.dtype} are not read")
            grid = check_grid(stored, name, scale.shape, shape)
            zero = parts.get("weight_zero_point")
            rows = scale.shape[0] if len(scale.shape) == 2 else 1
            if zero is not None and zero.shape not in (scale.shape, (words_for(rows, bits, stream), *scale.shape[1:])):
                raise stored.bad(f"{prefix}.weight_zero_point", f"{list(zero.shape)} beside scales {list(scale.shape)}")
            order = _order(stored, prefix, parts, shape[1], grid[1])
            make = partial(_dense, parts, shape, (bits, stream), grid, order)
            stored.put(f"{prefix}.weight", later(scale, shape, make), f"{prefix}.weight_packed")
            if order is None:
                keep_scales(stored, prefix, scale.make(), grid, shape)
            else:
                stored.notes.append(f"{prefix}: its groups are not of neighbours; packing will round it again")
            count += 1
        return count


def _layout(stored: Stored, prefix: str, parts: Parts, shape: tuple[int, ...]) -> tuple[int, bool]:
    """Return (bits, whether they are a stream)."""
    packed = parts["weight_packed"]
    told = schemes(stored, "num_bits")
    name = f"{prefix}.weight_packed"
    rows, columns = shape
    fits = [
        (bits, stream)
        for bits in WIDTHS
        for stream in ((False,) if 32 % bits == 0 else (False, True))
        if packed.shape == (rows, words_for(columns, bits, stream))
    ]
    if packed.dtype != torch.int32 or not fits:
        raise stored.bad(name, f"{packed.dtype} {list(packed.shape)} does not hold integers {list(shape)}")
    known = [each for each in fits if each[0] in told] if told else fits
    if not known:
        raise stored.bad(name, f"holds {fits[0][0]}-bit integers where the config says {told[0]}")
    bits = known[0][0]
    both = [stream for width, stream in known if width == bits]
    if len(both) == 2 and packed.shape[1] > 1:
        raise stored.bad(name, f"{columns} inputs of {bits} bits fill as many words in either layout: cannot be told")
    return bits, both[0]


def _order(stored: Stored, prefix: str, parts: Parts, columns: int, size: int) -> Tensor | None:
    """Return the group of every input, or None if the groups are of neighbours."""
    order = parts.get("weight_g_idx")
    if order is None:
        return None
    name = f"{prefix}.weight_g_idx"
    if order.shape != (columns,) or order.dtype.is_floating_point:
        raise stored.bad(name, f"{order.dtype} {list(order.shape)} is not a group for each of {columns} inputs")
    groups = order.make().long()
    if bool((groups < 0).all()):  # written where there is no order
        return None
    if not 0 <= int(groups.min()) <= int(groups.max()) < -(-columns // size):
        raise stored.bad(name, f"names group {int(groups.max())} of {-(-columns // size)}")
    return None if torch.equal(groups, torch.arange(columns) // size) else groups


def _dense(
    parts: Parts, shape: tuple[int, ...], layout: tuple[int, bool], grid: tuple[int, int], order: Tensor | None
) -> Tensor:
    middle = 1 << (layout[0] - 1)
    codes = unpack_words(parts["weight_packed"].make(), *layout)[:, : shape[1]] - middle
    scale = parts["weight_scale"].make()
    zero: Tensor | None = None
    if "weight_zero_point" in parts:
        zero = parts["weight_zero_point"].make()
        if zero.shape != scale.shape or zero.dtype == torch.int32:
            rows = scale.shape[0] if scale.dim() == 2 else 1
            zero = unpack_words(zero.view(len(zero), -1).t().contiguous(), *layout).t()[:rows] - middle
        zero = spread(zero, grid, shape, order)
    return dequantize(codes, spread(scale, grid, shape, order), zero)

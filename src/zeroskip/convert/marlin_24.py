"""marlin-24 of compressed-tensors: int4 or int8 codes of a 2:4 weight, in the order a GPU kernel reads them.

    P.weight_packed  I32 [in / 32, 16 out b / 32]
    P.scale_packed   F16 [groups, out]
    P.meta           I16 [in / 32, 2 out], really [out, in / 16]

How it was made, undone here from the end: of each four weights of a row two codes are kept, and their places are two
numbers of two bits in `meta`, whose elements CUTLASS puts in another order; the codes are turned to [in / 2, out], made
unsigned, cut into tiles of 16 x 16, mixed in runs of 1024 and packed into words, low bits first; scales of groups are
mixed in runs of 64.

Source: the compressed-tensors library, release 0.14.0.1, and CUTLASS (reordering of metadata); upstream only writes it.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from zeroskip.convert.base import Format, Parts, Stored, later
from zeroskip.convert.integers import check_grid, dequantize, keep_scales, spread, unpack_words

__all__ = ["Marlin24"]

INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
SCALES = (0, 4, 1, 5, 2, 6, 3, 7)


class Marlin24(Format):
    name = "marlin-24"

    def read(self, stored: Stored) -> int:
        count = 0
        for prefix, parts in stored.families("scale_packed", ("weight_packed", "meta")):
            packed, meta, scale = (parts[part] for part in ("weight_packed", "meta", "scale_packed"))
            rows, columns = (meta.shape[1] // 2, 32 * meta.shape[0]) if len(meta.shape) == 2 else (0, 0)
            fits = [bits for bits in INTERLEAVE if packed.shape == (columns // 32, rows * bits // 2)]
            kinds = (packed.dtype, meta.dtype) == (torch.int32, torch.int16) and scale.dtype.is_floating_point
            if not fits or not kinds or rows % 64 or 0 in packed.shape or scale.shape[1:] != (rows,):
                has = ", ".join(f"{part} {value.dtype} {list(value.shape)}" for part, value in parts.items())
                raise stored.bad(f"{prefix}.weight_packed", f"no weight is stored as {has}")
            shape = (rows, columns)
            grid = check_grid(stored, f"{prefix}.scale_packed", scale.shape[::-1], shape)
            make = partial(_dense, stored, prefix, parts, shape, fits[0], grid)
            stored.put(f"{prefix}.weight", later(scale, shape, make), f"{prefix}.weight_packed")
            stored.sparse.add(f"{prefix}.weight")
            keep_scales(stored, prefix, _scales(scale.make(), columns, grid[1]), grid, shape)
            count += 1
        return count


def _dense(
    stored: Stored, prefix: str, parts: Parts, shape: tuple[int, ...], bits: int, grid: tuple[int, int]
) -> Tensor:
    rows, columns = shape
    mixed = unpack_words(parts["weight_packed"].make(), bits).view(-1, 1024)
    tiles = torch.empty_like(mixed)
    tiles[:, _places(bits)] = mixed
    half = tiles.view(columns // 32, rows // 16, 16, 16).transpose(1, 2).reshape(columns // 2, rows)
    kept = half.t() - (1 << (bits - 1))
    low, high = _indices(parts["meta"].make().view(rows, columns // 16))
    if not bool((low < high).all()):
        raise stored.bad(f"{prefix}.meta", "names one of four weights twice")
    codes = torch.zeros(rows, columns // 4, 4, dtype=torch.int32)
    codes.scatter_(2, torch.stack((low, high), 2), kept.reshape(rows, columns // 4, 2))
    scale = spread(_scales(parts["scale_packed"].make(), columns, grid[1]), grid, shape)
    return dequantize(codes.view(rows, columns), scale, None)


def _scales(packed: Tensor, columns: int, size: int) -> Tensor:
    """Return [out, groups] from [groups, out]; only scales of groups smaller than half a row are mixed."""
    if size < columns // 2:
        runs = packed.reshape(-1, 64)
        order = torch.tensor([8 * run + place for run in range(8) for place in SCALES])
        packed = torch.empty_like(runs).index_copy_(1, order, runs).view(packed.shape)
    return packed.t().contiguous()


@lru_cache
def _places(bits: int) -> Tensor:
    """Return where in a run of 1024 each of its mixed elements belongs.

    The operand of the tensor core is held by 32 lanes; lane l has, of column l // 4 of an 8-column half tile and for
    four neighbouring tiles, the rows 2 (l % 4) + {0, 1, 8, 9}.
    """
    lanes = [
        [
            16 * row + 256 * (lane // 8) + 8 * (lane // 4 % 2) + 4 * block + tile
            for tile in range(4)
            for block in range(2)
            for row in (2 * (lane % 4) + step for step in (0, 1, 8, 9))
        ]
        for lane in range(32)
    ]
    flat = torch.tensor(lanes).view(-1, len(INTERLEAVE[bits]))
    return flat[:, list(INTERLEAVE[bits])].reshape(-1)


def _indices(mixed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of the first and the second weight of each four, [out, in / 4] each."""
    rows, count = mixed.shape
    row, column = torch.arange(rows).view(-1, 1), torch.arange(count).view(1, -1)
    # CUTLASS deals the rows of a block of 64 out anew, swaps the corners of every 2 x 2, and stores pairs of columns.
    place = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
    corner = ((place % 2 == 0) & (column % 2 == 1)).long() - ((place % 2 == 1) & (column % 2 == 0)).long()
    place, column = place + corner, column - corner
    found = mixed.reshape(-1)[column // 2 * (2 * rows) + 2 * place + column % 2].int()
    nibbles = (found.unsqueeze(2) >> torch.arange(0, 16, 4, dtype=torch.int32)) & 15
    nibbles = nibbles.view(rows, -1).long()
    return nibbles & 3, nibbles >> 2

"""Bits of masks, and zeros, as foreign formats hold them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_bits", "put_values", "unpack_bits"]

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack_bits(mask: Tensor) -> Tensor:
    """Return the bits of a mask [rows, columns] as uint8 [rows, ceil(columns / 8)], the first column lowest."""
    rows, columns = mask.shape
    wide = torch.nn.functional.pad(mask.to(torch.uint8), (0, -columns % 8)).view(rows, -1, 8)
    return (wide << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def unpack_bits(packed: Tensor, first: str = "low") -> Tensor:
    """Return the bits of uint8 [..., n] as bool [..., 8 n], the lowest (or "high": the highest) of a byte first."""
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = (packed.unsqueeze(-1) >> (shifts if first == "low" else shifts.flip(0))) & 1
    return bits.bool().view(*packed.shape[:-1], -1)


def put_values(mask: Tensor, values: Tensor) -> Tensor:
    """Return zeros of the shape of `mask`, and where it is True the `values` [count] in order; any dtype."""
    word = WORDS[values.dtype.itemsize]  # indexing is not there for every type of eight bits
    dense = torch.zeros(mask.shape, dtype=word)
    dense[mask] = values.contiguous().reshape(-1).view(word)
    return dense.view(values.dtype)

"""`csr`: the non-zeros of each row and their columns. For unstructured sparsity from some 90 % on."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroskip.formats.base import Format
from zeroskip.formats.blob import VALUES, Header, build

__all__ = ["Csr", "row_offsets", "to_raw"]

SLAB = 1 << 22  # weights that are looked at together: what bounds the memory beside weight and blob


def to_raw(weight: Tensor) -> npt.NDArray[Any]:
    """The bits of `weight` [m, k] as int32 or int16, which numpy knows, without a copy where it is contiguous."""
    bits = torch.int16 if weight.dtype == torch.bfloat16 else torch.int32
    array: npt.NDArray[Any] = weight.contiguous().view(bits).numpy()
    return array


def row_offsets(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The index of each row's first non-zero, and their number: int64 [m + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.count_nonzero(mask, axis=1), dtype=np.int64)])


class Csr(Format):
    name = "csr"

    def accepts(self, weight: Tensor) -> str | None:
        return None

    def pack(self, weight: Tensor) -> Tensor:
        m, k = weight.shape
        raw = to_raw(weight)
        mask = raw != 0
        offsets = row_offsets(mask)
        columns = np.broadcast_to(np.arange(k, dtype=np.uint16 if k <= 65536 else np.uint32), (m, k))[mask]
        values = "bf16" if weight.dtype == torch.bfloat16 else "fp32"
        parts = [torch.from_numpy(part.view(np.uint8)) for part in (offsets, columns, raw[mask])]
        return build(Header(self.name, m, k, int(offsets[-1]), values), parts)

    def unpack(self, header: Header, sections: list[Tensor]) -> Tensor:
        offsets = sections[0].numpy().view(np.int64)
        columns: npt.NDArray[Any] = sections[1].numpy().view(np.uint16 if header.k <= 65536 else np.uint32)
        weight = torch.zeros(header.m, header.k, dtype=VALUES[header.values])
        flat = to_raw(weight).reshape(-1)  # writes go to `weight`
        values = sections[2].numpy().view(flat.dtype)
        step = max(1, SLAB // header.k)
        for first in range(0, header.m, step):
            ends = offsets[first : first + step + 1]
            rows = np.arange(first, first + len(ends) - 1, dtype=np.int64) * header.k
            here = slice(ends[0], ends[-1])
            flat[np.repeat(rows, np.diff(ends)) + columns[here]] = values[here]
        return weight

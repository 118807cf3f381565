"""`bitmask`: one bit a weight and the non-zeros. For unstructured sparsity from 50 to some 90 %."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zeroskip.formats.base import Format
from zeroskip.formats.blob import VALUES, Header, build
from zeroskip.formats.csr import row_offsets, to_raw

__all__ = ["Bitmask"]

WORD = 32  # columns of one word of bits
TAIL = 64  # bytes of zeros after the last value


class Bitmask(Format):
    name = "bitmask"

    def accepts(self, weight: Tensor) -> str | None:
        return None

    def pack(self, weight: Tensor) -> Tensor:
        m, k = weight.shape
        raw = to_raw(weight)
        mask = raw != 0
        offsets = row_offsets(mask)
        bits = np.zeros((m, -(-k // WORD) * WORD // 8), np.uint8)
        bits[:, : -(-k // 8)] = np.packbits(mask, axis=1, bitorder="little")
        stored = np.concatenate([raw[mask].view(np.uint8), np.zeros(TAIL, np.uint8)])
        values = "bf16" if weight.dtype == torch.bfloat16 else "fp32"
        parts = [torch.from_numpy(part) for part in (bits, offsets.view(np.uint8), stored)]
        return build(Header(self.name, m, k, int(offsets[-1]), values), parts)

    def unpack(self, header: Header, sections: list[Tensor]) -> Tensor:
        bits = sections[0].numpy().reshape(header.m, -1)
        mask = np.unpackbits(bits, axis=1, count=header.k, bitorder="little").view(np.bool_)
        weight = torch.zeros(header.m, header.k, dtype=VALUES[header.values])
        raw = to_raw(weight)  # writes go to `weight`
        raw[mask] = sections[2].numpy()[:-TAIL].view(raw.dtype)
        return weight

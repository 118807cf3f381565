"""`bitmask`: one bit a weight and the non-zeros. For unstructured sparsity from 50 to some 90 %."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroskip.formats.base import Format
from zeroskip.formats.blob import VALUES, Header, build
from zeroskip.formats.csr import SLAB, row_offsets, to_raw
from zeroskip.quantize import LEAST, SCALES, Quantized

__all__ = ["Bitmask"]

WORD = 32  # columns of one word of bits
CHUNK = 64  # columns whose codes follow one another; integers come in pairs of chunks
TAIL = 64  # bytes of zeros after the last value

Array = npt.NDArray[Any]


class Bitmask(Format):
    name = "bitmask"
    values = ("fp32", "bf16", "int8", "int4")

    def accepts(self, weight: Tensor) -> str | None:
        return None

    def pack(self, weight: Tensor) -> Tensor:
        m, k = weight.shape
        raw = to_raw(weight)
        mask = raw != 0
        offsets = row_offsets(mask)
        stored = np.concatenate([raw[mask].view(np.uint8), np.zeros(TAIL, np.uint8)])
        values = "bf16" if weight.dtype == torch.bfloat16 else "fp32"
        parts = [torch.from_numpy(part) for part in (to_bits(mask, WORD), offsets.view(np.uint8), stored)]
        return build(Header(self.name, m, k, int(offsets[-1]), values), parts)

    def unpack(self, header: Header, sections: list[Tensor]) -> Tensor:
        mask = from_bits(sections[0], header)
        weight = torch.zeros(header.m, header.k, dtype=VALUES[header.values])
        raw = to_raw(weight)  # writes go to `weight`
        raw[mask] = sections[2].numpy()[:-TAIL].view(raw.dtype)
        return weight

    def pack_codes(self, weight: Quantized) -> Tensor:
        m, k = weight.codes.shape
        codes = weight.codes.numpy()
        mask = codes != 0
        lengths = np.concatenate([lengths for _, _, _, lengths in _places(mask, weight.values)])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        stored = np.zeros(int(offsets[-1]) + TAIL, np.uint8)
        for rows, places, high, _ in _places(mask, weight.values):
            byte = (codes[rows].astype(np.int16) - LEAST[weight.values]).astype(np.uint8)
            places = places + offsets[rows, None]
            for half, shift in ((~high, 0), (high, 4)):
                here = mask[rows] & half
                stored[places[here]] |= byte[here] << shift
        kind = next(name for name, dtype in SCALES.items() if dtype == weight.scales.dtype)
        header = Header(
            self.name, m, k, int(np.count_nonzero(mask)), weight.values, group_size=weight.group_size, scales=kind
        )
        parts = [torch.from_numpy(part) for part in (to_bits(mask, 2 * CHUNK), offsets.view(np.uint8), stored)]
        return build(header, [*parts, weight.scales])

    def unpack_codes(self, header: Header, sections: list[Tensor]) -> Quantized:
        mask = from_bits(sections[0], header)
        offsets, stored = sections[1].numpy().view(np.int64), sections[2].numpy()
        codes = np.zeros((header.m, header.k), np.int8)
        for rows, places, high, _ in _places(mask, header.values):
            places = places + offsets[rows, None]
            for half, shift in ((~high, 0), (high, 4)):
                here = mask[rows] & half
                byte = stored[places[here]]
                code = byte >> shift & 15 if header.values == "int4" else byte
                codes[rows][here] = (code.astype(np.int16) + LEAST[header.values]).astype(np.int8)
        scales = sections[3].view(SCALES[header.scales]).view(header.m, -1)
        return Quantized(torch.from_numpy(codes), scales, header.values, header.group_size)


def to_bits(mask: Array, multiple: int) -> Array:
    """Bits of a mask [m, k], least significant first: uint8 [m, k/8], k padded to a multiple."""
    m, k = mask.shape
    bits = np.zeros((m, -(-k // multiple) * multiple // 8), np.uint8)
    bits[:, : -(-k // 8)] = np.packbits(mask, axis=1, bitorder="little")
    return bits


def from_bits(section: Tensor, header: Header) -> npt.NDArray[np.bool_]:
    """The inverse of `to_bits`, from the bytes of the section: [m, k]."""
    bits = section.numpy().reshape(header.m, -1)
    return np.unpackbits(bits, axis=1, count=header.k, bitorder="little").view(np.bool_)


def _places(mask: Array, values: str) -> Iterator[tuple[slice, Array, Array, Array]]:
    """Where the codes of a mask [m, k] are stored, some rows at a time.

    Yields the rows; for each weight the byte of its row that holds its code; whether it is the high nibble; and the
    bytes that each row takes. int8: one byte after the other. int4: of each pair of chunks, the first fills the low
    nibbles and the second the high ones of the same bytes.
    """
    m, k = mask.shape
    step = max(1, SLAB // k)
    for first in range(0, m, step):
        rows = slice(first, min(first + step, m))
        if values == "int8":
            ends = np.cumsum(mask[rows], axis=1, dtype=np.int64)
            yield rows, ends - mask[rows], np.zeros((1, k), np.bool_), ends[:, -1]
            continue
        padded = np.pad(mask[rows], ((0, 0), (0, -k % (2 * CHUNK)))).reshape(rows.stop - first, -1, 2, CHUNK)
        ends = np.cumsum(padded, axis=3, dtype=np.int64)
        taken = ends[..., -1].max(2)
        starts = np.cumsum(taken, axis=1) - taken
        places = (starts[:, :, None, None] + ends - padded).reshape(rows.stop - first, -1)[:, :k]
        high = np.broadcast_to(np.arange(k) // CHUNK % 2 == 1, (1, k))
        yield rows, places, high, taken.sum(1)

"""`dense`: panels of 16 rows, no zeros skipped. The rival inside the house, and often the right choice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from zeroskip.formats.base import Format
from zeroskip.formats.blob import VALUES, Header, build
from zeroskip.quantize import LEAST, SCALES, Quantized

__all__ = ["Dense", "codes_from_panels", "codes_to_panels", "from_panels", "to_panels"]

PANEL = 16


def to_panels(weight: Tensor) -> Tensor:
    """[m, k] to fp32 [m/16, k, 16] or bf16 [m/16, k/2, 16, 2]; rows are padded to 16, bf16 columns to 32."""
    m, k = weight.shape
    paired = weight.dtype == torch.bfloat16
    padded = pad(weight, (0, -k % 32 if paired else 0, 0, -m % PANEL))
    panels = padded.view(padded.shape[0] // PANEL, PANEL, -1)
    if not paired:
        return panels.transpose(1, 2).contiguous()
    rows, k = panels.shape[0], panels.shape[2]
    return panels.view(rows, PANEL, k // 2, 2).transpose(1, 2).contiguous()


def from_panels(raw: Tensor, m: int, k: int, values: str) -> Tensor:
    """The inverse of `to_panels`, from the bytes of the section."""
    dtype = VALUES[values]
    panels = -(-m // PANEL)
    data = raw.contiguous().view(dtype)
    if dtype == torch.bfloat16:
        rows = data.view(panels, -1, PANEL, 2).transpose(1, 2).flatten(2)
    else:
        rows = data.view(panels, -1, PANEL).transpose(1, 2)
    return rows.reshape(panels * PANEL, -1)[:m, :k].contiguous()


def codes_to_panels(codes: Tensor, values: str, group_size: int) -> Tensor:
    """int8 codes [m, k] to uint8 [m/16, k/4, 16, 4] (int8) or [m/16, k/8, 16, 4] (int4: two quads a byte).

    Codes are stored from 0 up (+ 128, + 8). Rows are padded to 16 and columns to a whole group, with code 0.
    """
    m, k = codes.shape
    padded = pad(codes, (0, -k % group_size, 0, -m % PANEL)).to(torch.int16) - LEAST[values]
    quads = padded.to(torch.uint8).view(padded.shape[0] // PANEL, PANEL, -1, 4).transpose(1, 2)
    if values == "int8":
        return quads.contiguous()
    return quads[:, 0::2] | quads[:, 1::2] << 4


def codes_from_panels(raw: Tensor, m: int, k: int, values: str) -> Tensor:
    """The inverse of `codes_to_panels`, from the bytes of the section."""
    panels = -(-m // PANEL)
    quads = raw.view(panels, -1, PANEL, 4)
    if values == "int4":
        quads = torch.stack([quads & 15, quads >> 4], 2).flatten(1, 2)
    rows = quads.transpose(1, 2).reshape(panels * PANEL, -1)[:m, :k]
    return (rows.to(torch.int16) + LEAST[values]).to(torch.int8)


class Dense(Format):
    name = "dense"
    values = ("fp32", "bf16", "int8", "int4")

    def accepts(self, weight: Tensor) -> str | None:
        return None

    def pack(self, weight: Tensor) -> Tensor:
        m, k = weight.shape
        values = "bf16" if weight.dtype == torch.bfloat16 else "fp32"
        return build(Header(self.name, m, k, int(torch.count_nonzero(weight)), values), [to_panels(weight)])

    def unpack(self, header: Header, sections: list[Tensor]) -> Tensor:
        return from_panels(sections[0], header.m, header.k, header.values)

    def pack_codes(self, weight: Quantized) -> Tensor:
        m, k = weight.codes.shape
        scales = pad(weight.scales, (0, 0, 0, -m % PANEL)).view(-(-m // PANEL), PANEL, -1).transpose(1, 2)
        kind = next(name for name, dtype in SCALES.items() if dtype == scales.dtype)
        nnz = int(torch.count_nonzero(weight.codes))
        header = Header(self.name, m, k, nnz, weight.values, group_size=weight.group_size, scales=kind)
        return build(header, [codes_to_panels(weight.codes, weight.values, weight.group_size), scales])

    def unpack_codes(self, header: Header, sections: list[Tensor]) -> Quantized:
        codes = codes_from_panels(sections[0], header.m, header.k, header.values)
        groups = -(-header.k // header.group_size)
        scales = sections[1].view(SCALES[header.scales]).view(-1, groups, PANEL).transpose(1, 2)
        scales = scales.reshape(-1, groups)[: header.m].contiguous()
        return Quantized(codes, scales, header.values, header.group_size)

    def pattern(self, header: Header) -> str:
        return "dense"

"""`dense`: panels of 16 rows, no zeros skipped. The rival inside the house, and often the right choice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from zeroskip.formats.base import Format
from zeroskip.formats.blob import VALUES, Header, build

__all__ = ["Dense", "from_panels", "to_panels"]

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


class Dense(Format):
    name = "dense"

    def accepts(self, weight: Tensor) -> str | None:
        return None

    def pack(self, weight: Tensor) -> Tensor:
        m, k = weight.shape
        values = "bf16" if weight.dtype == torch.bfloat16 else "fp32"
        return build(Header(self.name, m, k, int(torch.count_nonzero(weight)), values), [to_panels(weight)])

    def unpack(self, header: Header, sections: list[Tensor]) -> Tensor:
        return from_panels(sections[0], header.m, header.k, header.values)

    def pattern(self, header: Header) -> str:
        return "dense"

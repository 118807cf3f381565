"""`strip_nm`: N of every M columns, the choice shared by strips of V rows (pattern ``N:M@V``)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from zeroskip.formats.base import Format
from zeroskip.formats.blob import Header, build
from zeroskip.formats.dense import from_panels, to_panels

__all__ = ["StripNM", "detect"]

STRIPS = (128, 64, 32, 16)  # rows of a strip, multiples of the 16-row panel
GROUPS = (2, 4, 8, 16, 32, 64)  # divisors of the 64-input chunk
CHUNK = 64


def _used(weight: Tensor, strip: int) -> Tensor:
    """Which columns each strip of rows uses: bool [strips, k]."""
    mask = pad(weight != 0, (0, 0, 0, -weight.shape[0] % strip))
    return mask.view(-1, strip, weight.shape[1]).any(1)


def detect(weight: Tensor) -> tuple[int, int, int] | None:
    """Find N, M, V from the zeros of `weight` [m, k].

    Of all fits the one that stores the least is taken; among equals the largest V, then the smallest M. None if no
    fit leaves anything out.
    """
    k = weight.shape[1]
    best, density = None, 1.0
    for strip in STRIPS:
        used = _used(weight, strip)
        for group in GROUPS:
            if k % group:
                continue
            n = max(1, int(used.view(used.shape[0], -1, group).sum(2).max()))
            if n / group < density:
                best, density = (n, group, strip), n / group
    return best


class StripNM(Format):
    name = "strip_nm"

    def accepts(self, weight: Tensor) -> str | None:
        if detect(weight) is not None:
            return None
        return "no N:M@V fits its zeros (V of 16, 32, 64, 128 rows, M a divisor of 64 and of the inputs)"

    def pack(self, weight: Tensor) -> Tensor:
        fit = detect(weight)
        if fit is None:
            raise ValueError("accepts() was not asked")
        n, group, strip = fit
        m, k = weight.shape
        used = _used(weight, strip).view(-1, k // group, group)
        # The used columns first, then unused ones until there are N; both in ascending order.
        order = torch.argsort((~used).to(torch.uint8), dim=2, stable=True)[..., :n].sort(dim=2).values
        columns = (order + torch.arange(0, k, group).view(1, -1, 1)).flatten(1)
        per_row = columns.repeat_interleave(strip, dim=0)[:m]
        values = "bf16" if weight.dtype == torch.bfloat16 else "fp32"
        header = Header(self.name, m, k, int(torch.count_nonzero(weight)), values, n, group, strip)
        return build(header, [(columns % CHUNK).to(torch.uint8), to_panels(weight.gather(1, per_row))])

    def unpack(self, header: Header, sections: list[Tensor]) -> Tensor:
        kept = header.k // header.group * header.n
        in_chunk = CHUNK // header.group * header.n
        chunk = torch.arange(kept) // in_chunk * CHUNK
        columns = sections[0].view(-1, kept).long() + chunk
        compact = from_panels(sections[1], header.m, kept, header.values)
        weight = torch.zeros(header.m, header.k, dtype=compact.dtype)
        rows = min(header.strip, header.m)  # a blob may claim any height
        return weight.scatter_(1, columns.repeat_interleave(rows, dim=0)[: header.m], compact)

    def pattern(self, header: Header) -> str:
        return f"{header.n}:{header.group}@{header.strip}"

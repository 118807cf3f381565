"""Pictures of where the zeros of a weight are, as grey PNG images inside the page."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zeroskip.model import every_site
from zeroskip.prune.report import Row
from zeroskip.report.places import place

__all__ = ["Mask", "masks", "png"]

SHOWN = 8  # sites
WHOLE = (96, 192)  # pixels of the whole matrix at most, each the mean of what lies under it
CORNER = (48, 96)  # weights of the corner, each one pixel


@dataclass(frozen=True)
class Mask:
    """Two pictures of one site as data: URIs, and the shape of its first matrix."""

    name: str
    shape: tuple[int, int]
    whole: str
    corner: str


def masks(model: nn.Module, rows: Sequence[Row]) -> list[Mask]:
    """Draw one site of each kind, from the middle of the model; those that are packed have no picture."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(place(row.name)[1], []).append(row)
    sites = {site.name: site for site in every_site(model)}
    found = []
    for alike in list(kinds.values())[:SHOWN]:
        row = alike[len(alike) // 2]
        if row.name in sites:
            found.append(_mask(row.name, sites[row.name].weight()[0] != 0))
    return found


def _mask(name: str, kept: Tensor) -> Mask:
    height, width = kept.shape
    size = (min(height, WHOLE[0]), min(width, WHOLE[1]))
    whole = nn.functional.adaptive_avg_pool2d(kept.float()[None], size)[0]
    return Mask(name, (height, width), *map(_uri, (whole, kept[: CORNER[0], : CORNER[1]].float())))


def _uri(kept: Tensor) -> str:
    return "data:image/png;base64," + base64.b64encode(png((255 * (1 - kept)).round().to(torch.uint8))).decode()


def png(grey: Tensor) -> bytes:
    """Return an 8-bit grey PNG of [height, width] uint8, 0 being black."""
    height, width = grey.shape
    lines = torch.cat([grey.new_zeros(height, 1), grey.cpu()], 1).contiguous()  # each line begins with its filter: none
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines.numpy().tobytes(), 9)), (b"IEND", b""))
    body = (
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)

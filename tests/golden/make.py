"""Make the golden directory of the current format version: ``python tests/golden/make.py``, once for each version.

A directory that was released is never made again: old files must load as they are. The weights come from whole
numbers, not from a random generator, so that a test can say for ever which bits must come out.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from zeroskip.formats import pack
from zeroskip.io import save
from zeroskip.io.meta import FORMAT_VERSION
from zeroskip.nn import PackedLinear
from zeroskip.prune.report import Report

FORMATS = ("dense", "csr", "bitmask", "strip_nm")
LAYERS = [(name, values) for name in FORMATS for values in ("fp32", "bf16")]
ROWS, COLUMNS = 24, 64  # a strip and a panel of 16 rows, and short ones


def weight(number: int, name: str, values: str) -> Tensor:
    """Return the weight of layer `number`, [ROWS, COLUMNS]: multiples of 1/64 below 2, half of them zero."""
    i, j = torch.arange(ROWS)[:, None], torch.arange(COLUMNS)[None, :]
    whole = (i * 37 + j * 101 + number * 53) % 255 - 127
    whole = torch.where(whole == 0, torch.tensor(1), whole)
    keep = (j * 7 + i // 16 * 3) % 4 < 2 if name == "strip_nm" else (i * 5 + j * 3 + number) % 7 < 3
    if name == "dense":
        keep = torch.ones_like(keep)
    return (whole * keep).to(torch.float32 if values == "fp32" else torch.bfloat16) / 64


def bias() -> Tensor:
    return (torch.arange(ROWS) - 12) / 8


def empty() -> nn.ModuleDict:
    """Return the model to fill: a layer for each format and value type, and one that stays dense."""
    layers: dict[str, nn.Module] = {
        f"{name}_{values}": nn.Linear(COLUMNS, ROWS, bias=values == "fp32") for name, values in LAYERS
    }
    return nn.ModuleDict(layers | {"plain": nn.Linear(4, 3)})


def main() -> None:
    model = empty()
    for number, (name, values) in enumerate(LAYERS):
        packed = pack(weight(number, name, values), name, values)
        model[f"{name}_{values}"] = PackedLinear.from_packed(packed, bias() if values == "fp32" else None)
    with torch.no_grad():
        model["plain"].weight.copy_(torch.arange(12).reshape(3, 4))
        model["plain"].bias.copy_(torch.arange(3))
    object.__setattr__(model, "zeroskip_report", Report({"method": "golden"}, [], {"plain": "left dense"}, 1.0))
    save(model, Path(__file__).parent / f"v{FORMAT_VERSION}")


if __name__ == "__main__":
    main()

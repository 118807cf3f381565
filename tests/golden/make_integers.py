"""Make the golden directory of integer weights: ``python tests/golden/make_integers.py``, once for each version.

As make.py, for what it leaves out: int8 and int4, groups of 32, 64 and 128 inputs, scales in fp16 and fp32. Codes and
scales come from whole numbers, so a test can say for ever which must come out.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from zeroskip.formats import pack
from zeroskip.io import save
from zeroskip.io.meta import FORMAT_VERSION
from zeroskip.nn import PackedLinear

LAYERS = list(product(("dense", "bitmask"), ("int8", "int4"), (32, 64, 128), (torch.float16, torch.float32)))
ROWS, COLUMNS = 24, 144  # a panel of 16 rows and a short one; a short last group, whatever its size


def label(name: str, values: str, group: int, dtype: torch.dtype) -> str:
    return f"{name}_{values}_{group}_{'fp16' if dtype == torch.float16 else 'fp32'}"


def codes(number: int, name: str, values: str) -> Tensor:
    """int8 [ROWS, COLUMNS]: every code there is; some four in seven of them 0 where the format skips zeros."""
    i, j = torch.arange(ROWS)[:, None], torch.arange(COLUMNS)[None, :]
    most = 127 if values == "int8" else 7
    whole = (i * 37 + j * 101 + number * 53) % (2 * most + 1) - most
    keep = (i * 5 + j * 3 + number) % 7 < 3
    return (whole if name == "dense" else whole * keep).to(torch.int8)


def scales(number: int, group: int, dtype: torch.dtype) -> Tensor:
    """[ROWS, groups] powers of two from 1/32 to 1/8."""
    i, g = torch.arange(ROWS)[:, None], torch.arange(-(-COLUMNS // group))[None, :]
    return (2.0 ** ((i + 2 * g + number) % 3 - 5)).to(dtype)


def weight(number: int, name: str, values: str, group: int, dtype: torch.dtype) -> Tensor:
    """fp32 [ROWS, COLUMNS]: what the codes stand for."""
    wide = scales(number, group, dtype).float().repeat_interleave(group, dim=1)[:, :COLUMNS]
    return codes(number, name, values).float() * wide


def inputs() -> Tensor:
    """fp32 [5, COLUMNS]: whole numbers whose rounding to int8 is exact, for every group holds a 127."""
    x = (torch.arange(5 * COLUMNS).reshape(5, -1) % 7 - 3).float()
    x[:, ::32] = 127.0
    return x


def empty() -> nn.ModuleDict:
    """Return the model to fill."""
    return nn.ModuleDict({label(*layer): nn.Linear(COLUMNS, ROWS, bias=False) for layer in LAYERS})


def main() -> None:
    model = empty()
    for number, (name, values, group, dtype) in enumerate(LAYERS):
        given = weight(number, name, values, group, dtype)
        packed = pack(given, name, values, group_size=group, scales=scales(number, group, dtype))
        model[label(name, values, group, dtype)] = PackedLinear.from_packed(packed, None)
    save(model, Path(__file__).parent / f"integers-v{FORMAT_VERSION}")


if __name__ == "__main__":
    main()

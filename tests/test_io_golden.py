"""Directories of every released format version still load, to the same bits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from zeroskip.formats import unpack
from zeroskip.io import load
from zeroskip.io.meta import FORMAT_VERSION
from zeroskip.ops import linear

GOLDEN = Path(__file__).parent / "golden"
_spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
assert _spec is not None and _spec.loader is not None
make: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


def test_there_is_one_for_each_version() -> None:
    assert sorted(path.name for path in GOLDEN.glob("v*")) == [f"v{n + 1}" for n in range(FORMAT_VERSION)]


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_it_loads_to_the_same_bits(version: int) -> None:
    model: Any = load(GOLDEN / f"v{version}", model=make.empty())
    for number, (name, values) in enumerate(make.LAYERS):
        layer = model[f"{name}_{values}"]
        packed, expected = layer.packed, make.weight(number, name, values)
        assert (packed.format, packed.values) == (name, values)
        found = unpack(packed)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        assert not bool(torch.signbit(found[found == 0]).any())
        # Small multiples of 1/64 and whole inputs: the sum is exact in fp32, in any order.
        x = (torch.arange(3 * make.COLUMNS).reshape(3, -1) % 7 - 3).float()
        exact = x @ expected.float().t() + (make.bias() if values == "fp32" else 0)
        assert torch.equal(layer(x), exact) and torch.equal(linear(packed, x, layer.bias), exact)
    assert torch.equal(model["plain"].weight, torch.arange(12.0).reshape(3, 4))
    assert model.zeroskip_report.recipe == {"method": "golden"}

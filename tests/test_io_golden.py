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


def _made_by(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make, make_integers = _made_by("make"), _made_by("make_integers")


@pytest.mark.parametrize("kind", ["", "integers-"])
def test_there_is_one_for_each_version(kind: str) -> None:
    found = sorted(path.name for path in GOLDEN.glob(f"{kind}v*"))
    assert found == [f"{kind}v{n + 1}" for n in range(FORMAT_VERSION)]


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


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_integers_load_to_the_same_codes_and_scales(version: int) -> None:
    model: Any = load(GOLDEN / f"integers-v{version}", model=make_integers.empty())
    x = make_integers.inputs()
    for number, layer in enumerate(make_integers.LAYERS):
        name, values, group, dtype = layer
        packed = model[make_integers.label(*layer)].packed
        assert (packed.format, packed.values, packed.group_size) == (name, values, group)
        assert torch.equal(packed.codes, make_integers.codes(number, name, values))
        assert packed.scales.dtype == dtype
        assert torch.equal(packed.scales, make_integers.scales(number, group, dtype))
        expected = make_integers.weight(number, *layer)
        assert torch.equal(unpack(packed), expected)
        # Products and sums of these whole numbers and powers of two are exact in fp32, in any order.
        for tokens in (1, len(x)):
            assert torch.equal(linear(packed, x[:tokens], None), x[:tokens] @ expected.t())

"""A dense layer of ours: another precision than the model's, or prepacked by torch.

It is stored as the ordinary weight that it holds, in its own precision, and comes back as nn.Linear; the plan then sets
it up anew. Where the architecture has a Conv1D it is stored transposed, so that plain transformers can load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from zeroskip.dense_layers import DTYPES, DenseLinear, OneDnnLinear
from zeroskip.io.kinds.base import Kind, Stored
from zeroskip.io.tensors import dtype_name, is_float
from zeroskip.model import Site
from zeroskip.planning.install import put_in
from zeroskip.sites import Conv1DAdapter

__all__ = ["Dense", "finish", "straighten"]


class Dense(Kind):
    """A weight [m, k] of "dtype"; "transposed" where the file has it [k, m]."""

    kind = "dense"
    layers = (OneDnnLinear, DenseLinear)

    @staticmethod
    def describe(layer: Any) -> dict[str, Any]:
        dtype = DTYPES[layer.values] if isinstance(layer, OneDnnLinear) else layer.weight.dtype
        return {"dtype": dtype_name(dtype), "transposed": False}

    @staticmethod
    def problem(site: Stored) -> str | None:
        return None if is_float(site.get("dtype")) else f"dtype {site.get('dtype')!r} is not a floating-point type"

    @staticmethod
    def differs(site: Stored, module: nn.Module, inside: Site | None) -> str | None:
        if site.get("transposed") and not Conv1DAdapter.matches(module):
            return f"stored transposed, which a {type(module).__name__} is not"
        return None

    @staticmethod
    def empty(site: Stored, old: Any) -> nn.Module:
        dtype = getattr(torch, site["dtype"])
        if site.get("transposed"):  # loaded into the model's own Conv1D, then straightened
            old.weight = nn.Parameter(torch.empty_like(old.weight, dtype=dtype, device="meta"), requires_grad=False)
            return old  # type: ignore[no-any-return]
        rows, columns = site["shape"]
        return nn.Linear(columns, rows, site["bias"] is not None, dtype=dtype).requires_grad_(False)


def straighten(model: nn.Module, sites: Mapping[str, dict[str, Any]]) -> dict[str, nn.Module]:
    """Turn the dense sites that were loaded as Conv1D into nn.Linear, which a plan can set up; return the old ones."""
    turned: dict[str, nn.Module] = {}
    for name, site in sites.items():
        if site.get("transposed"):
            old: Any = model.get_submodule(name)
            rows, columns = site["shape"]
            layer = nn.Linear(columns, rows, old.bias is not None, device="meta")
            layer.weight = nn.Parameter(old.weight.detach().t().contiguous(), requires_grad=False)
            layer.bias = old.bias
            put_in(model, old, layer.train(old.training))
            turned[name] = old
    return turned


def finish(
    model: nn.Module, sites: Mapping[str, dict[str, Any]], dtype: str | None, turned: Mapping[str, nn.Module]
) -> None:
    """See to the dense sites that no plan set up: those not in the model's `dtype` still compute in their own."""
    for name, site in sites.items():
        layer = model.get_submodule(name)
        if site["kind"] != "dense" or type(layer) is not nn.Linear:
            continue
        values = next((text for text, known in DTYPES.items() if known == layer.weight.dtype), None)
        if values is not None and dtype_name(layer.weight.dtype) != dtype:
            put_in(model, layer, DenseLinear.pack(layer.weight, layer.bias, values).train(layer.training))
        elif name in turned:
            put_in(model, layer, turned[name])

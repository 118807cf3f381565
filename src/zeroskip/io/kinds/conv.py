"""A packed convolution: a blob, and what the convolution is besides its weight."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from zeroskip.conv_layers import PackedConv, geometry_of, geometry_problem
from zeroskip.io.kinds.base import Stored
from zeroskip.io.kinds.linear import Linear
from zeroskip.model import Site
from zeroskip.sites.conv import KINDS

__all__ = ["Conv"]


class Conv(Linear):
    """With "conv", what `geometry_of` gives."""

    mark = "conv"
    layers = (PackedConv,)

    @staticmethod
    def describe(layer: Any) -> dict[str, Any]:
        return Linear.describe(layer) | {"conv": geometry_of(layer)}

    @staticmethod
    def problem(site: Stored) -> str | None:
        return geometry_problem(site["conv"])

    @staticmethod
    def differs(site: Stored, module: nn.Module, inside: Site | None) -> str | None:
        has = geometry_of(cast(Any, module)) if isinstance(module, (*KINDS, PackedConv)) else None
        stored = site.get("conv")
        return None if stored == has else f"stored as convolution {stored} where the model has {has}"

    @staticmethod
    def empty(site: Stored, old: Any) -> nn.Module:
        rows, columns = site["shape"]
        return PackedConv(columns, rows, site["nbytes"], site["conv"], site["bias"] is not None)

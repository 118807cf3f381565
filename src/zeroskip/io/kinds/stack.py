"""A packed stack, such as the products of experts: its blobs one after another."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zeroskip.formats.blob import ALIGNMENT
from zeroskip.io.kinds.base import Stored
from zeroskip.io.kinds.linear import Linear
from zeroskip.model import Site
from zeroskip.split_layers import PackedStack

__all__ = ["Stack"]


class Stack(Linear):
    """With "stack", the bytes of each blob; "format" and "values" are those of the first."""

    mark = "stack"
    layers = (PackedStack,)

    @staticmethod
    def describe(layer: Any) -> dict[str, Any]:
        first, sizes = layer.packed[0], list(layer.sizes)
        about = {"format": first.format, "values": first.values, "nbytes": sum(sizes)}
        return about | {"stack": sizes, "activation": None}

    @staticmethod
    def problem(site: Stored) -> str | None:
        sizes = site["stack"]
        if not isinstance(sizes, list) or not all(type(n) is int and n > 0 and n % ALIGNMENT == 0 for n in sizes):
            return f"stack {sizes!r} is not positive multiples of {ALIGNMENT}"
        if sum(sizes) != site["nbytes"]:
            return f"stack has {sum(sizes)} bytes where nbytes is {site['nbytes']}"
        return None

    @staticmethod
    def differs(site: Stored, module: nn.Module, inside: Site | None) -> str | None:
        sizes, count = site.get("stack"), 1 if inside is None else inside.shape[0]
        stored = len(sizes) if isinstance(sizes, list) else 1
        return None if stored == count else f"stored as {stored} where the model has {count}"

    @staticmethod
    def empty(site: Stored, old: Any) -> nn.Module:
        rows, columns = site["shape"]
        return PackedStack(columns, rows, site["stack"], site["bias"] is not None)

    @staticmethod
    def blobs(layer: Any) -> list[Tensor]:
        return [layer.blob(i).detach() for i in range(len(layer.sizes))]

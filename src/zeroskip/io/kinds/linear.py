"""A packed linear layer: its blob."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from zeroskip.formats.blob import ALIGNMENT
from zeroskip.io.kinds.base import Kind, Stored
from zeroskip.nn import PackedLinear
from zeroskip.ops import ACTIVATIONS

__all__ = ["Linear"]


class Linear(Kind):
    """One blob: "format", "values", "nbytes", and an "activation" where one is fused into the kernel."""

    kind = "packed"
    layers: ClassVar[tuple[type[nn.Module], ...]] = (PackedLinear,)

    @staticmethod
    def describe(layer: Any) -> dict[str, Any]:
        packed = layer.packed
        about = {"format": packed.format, "values": packed.values, "nbytes": packed.nbytes}
        return about | {"activation": layer.activation}

    @staticmethod
    def problem(site: Stored) -> str | None:
        nbytes, activation = site.get("nbytes"), site.get("activation")
        if type(nbytes) is not int or not 0 < nbytes < 1 << 48 or nbytes % ALIGNMENT:
            return f"nbytes {nbytes!r} is not a positive multiple of {ALIGNMENT}"
        if activation is not None and activation not in ACTIVATIONS:
            return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
        return None

    @staticmethod
    def empty(site: Stored, old: Any) -> nn.Module:
        (rows, columns), bias = site["shape"], site["bias"] is not None
        return PackedLinear(columns, rows, site["nbytes"], bias, site.get("activation"))

    @staticmethod
    def blobs(layer: Any) -> list[Tensor]:
        return [layer.weight.detach()]

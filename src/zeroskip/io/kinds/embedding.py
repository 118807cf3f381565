"""A packed embedding: a blob that is a table."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zeroskip.embedding_layers import PackedEmbedding
from zeroskip.io.kinds.base import Stored
from zeroskip.io.kinds.linear import Linear
from zeroskip.model import Site

__all__ = ["Embedding"]


class Embedding(Linear):
    """With "table", which is true."""

    mark = "table"
    layers = (PackedEmbedding,)

    @staticmethod
    def describe(layer: Any) -> dict[str, Any]:
        return Linear.describe(layer) | {"table": True}

    @staticmethod
    def problem(site: Stored) -> str | None:
        sound = site["table"] is True and site["bias"] is None
        return None if sound else "table, where it is there, is true, and tables have no bias"

    @staticmethod
    def differs(site: Stored, module: nn.Module, inside: Site | None) -> str | None:
        if ("table" in site) == isinstance(module, nn.Embedding | PackedEmbedding):
            return None
        stored = "table" if "table" in site else "layer that multiplies"
        return f"stored as a {stored} where the model has a {type(module).__name__}"

    @staticmethod
    def empty(site: Stored, old: Any) -> nn.Module:
        rows, columns = site["shape"]
        return PackedEmbedding(columns, rows, site["nbytes"])

    @staticmethod
    def settle(layer: Any, dtype: torch.dtype) -> None:
        layer.settle(dtype)

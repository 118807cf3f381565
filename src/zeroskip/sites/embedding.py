"""Embeddings: a table of which each token takes one row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import nn

from zeroskip.sites.base import Adapter, Call, Inputs, is_weight

__all__ = ["EmbeddingAdapter"]


class EmbeddingAdapter(Adapter):
    """nn.Embedding, [1, vocabulary, width]: a row for each token, as a language model's head sees the same table.

    What "flows in" is the row's own choice, so every input counts as often as there were tokens: Wanda compares sizes
    within each token's row, whose vector keeps its share whether the calibration text has the token or not. Inputs
    never meet, so there is no Gram matrix.
    """

    asked: ClassVar[str] = "embedding"
    statistics: ClassVar[tuple[str, ...] | None] = ("sum", "sumsq")

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding) and is_weight(module)

    @staticmethod
    def inputs(module: nn.Module, call: Call, wanted: Sequence[str]) -> Iterator[tuple[str, Inputs]]:
        tokens = call.tokens(call.x.unsqueeze(-1))
        width = module.get_parameter("weight").shape[1]
        yield "weight", torch.ones(1, device=tokens.device).expand(1, len(tokens), width)

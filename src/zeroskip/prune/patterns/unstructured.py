"""Zeros anywhere: "unstructured", where the method decides which scores compete, or with the scope in the name.

"unstructured:row"         equally many zeros in every row, up to one
"unstructured:tensor"      over the whole matrix
"unstructured:columns128"  over all rows of every 128 consecutive inputs (the last may be fewer)

Scores of all layers compete under the budget "global".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from zeroskip.errors import ZeroskipError
from zeroskip.prune.patterns.base import Pattern, Scope
from zeroskip.prune.patterns.block import Block

__all__ = ["Unstructured"]


@dataclass(frozen=True)
class Unstructured(Block):
    """Single weights; `own` is the scope in the name, `columns` the inputs of a part where that is "columns"."""

    examples: ClassVar[tuple[str, ...]] = (
        "unstructured",
        "unstructured:row",
        "unstructured:tensor",
        "unstructured:columns128",
    )

    height: int = 1
    width: int = 1
    own: Scope | None = None
    columns: int = 0

    @classmethod
    def read(cls, text: str) -> Pattern | None:
        found = re.fullmatch(r"unstructured(?::(row|tensor|columns)([0-9]{0,9}))?", text)
        if found is None or (found[2] and found[1] != "columns"):
            return None
        if found[1] == "columns" and not int(found[2] or 0):
            raise ZeroskipError(f"pattern {text!r}: say how many inputs compete, such as 'unstructured:columns128'")
        scope: Scope | None = None if found[1] is None else "row" if found[1] == "row" else "tensor"
        if found[1] == "columns":
            return Unstructured(text, own="columns", columns=int(found[2]))
        return Unstructured(text, own=scope)

    @property
    def scope(self) -> Scope | None:
        return self.own

    @property
    def together(self) -> int | None:
        return self.columns or None

    def select(self, score: Tensor, sparsity: float, scope: Scope = "tensor") -> Tensor:
        if self.own != "columns":
            return super().select(score, sparsity, self.own or scope)
        rows, k = score.shape
        drop = round(score.numel() * sparsity)
        ends = [*range(0, k, self.columns), k]
        parts = []
        for start, stop in pairwise(ends):
            share = (round(drop * stop / k) - round(drop * start / k)) / (rows * (stop - start))
            parts.append(super().select(score[:, start:stop], share))
        return torch.cat(parts, 1)

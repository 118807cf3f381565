"""Whole blocks: "block:RxC", R outputs by C inputs. Vectors are blocks too: "block:1x4", "block:16x1"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zeroskip.errors import ZeroskipError
from zeroskip.prune.patterns.base import Pattern, Scope, multiple_of
from zeroskip.prune.patterns.lowest import lowest, lowest_by_row

__all__ = ["Block"]


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of `height` outputs by `width` inputs."""

    examples: ClassVar[tuple[str, ...]] = ("block:16x1", "block:1x4")

    height: int
    width: int

    @classmethod
    def read(cls, text: str) -> Pattern | None:
        found = re.fullmatch(r"block:([0-9]{1,9})x([0-9]{1,9})", text)
        if found is None:
            return None
        height, width = map(int, found.groups())
        if height < 1 or width < 1:
            raise ZeroskipError(f"pattern {text!r}: a block is at least 1x1")
        return Block(text, height, width)

    @property
    def rows(self) -> int:
        return self.height

    @property
    def permutes(self) -> bool:
        return self.height * self.width > 1

    def check(self, shape: tuple[int, ...], name: str) -> None:
        multiple_of(name, shape[-2], "outputs", self.height, self.name)
        multiple_of(name, shape[-1], "inputs", self.width, self.name)

    def shares(self, sparsity: float, groups: int, shape: tuple[int, ...]) -> list[float]:
        units = shape[-2] // self.height * (shape[-1] // self.width)
        drop = round(groups * units * sparsity)
        return [(drop * (group + 1) // groups - drop * group // groups) / units for group in range(groups)]

    def select(self, score: Tensor, sparsity: float, scope: Scope = "tensor") -> Tensor:
        rows, columns = score.shape
        grid = score
        if self.height * self.width > 1:
            grid = score.reshape(rows // self.height, self.height, columns // self.width, self.width).sum((1, 3))
        drop = round(grid.numel() * sparsity)
        keep = ~(lowest_by_row(grid, drop) if scope == "row" else lowest(grid.reshape(1, -1), drop).view_as(grid))
        return keep.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)

"""Arithmetic: sparsity rises by the same step from block to block, because early errors travel furthest."""

from __future__ import annotations

from collections.abc import Sequence

from zeroskip.prune.budgets.base import Budget, Item, Levels
from zeroskip.prune.budgets.costs import Cost


class Arithmetic(Budget):
    """`rise`: how much sparser the last block is than the first.

    Source: arXiv 2502.14770, where the one slope is searched for; ours counts to the last weight.
    """

    name = "arithmetic"
    options = {"rise": (0.15, -1.0, 1.0)}  # noqa: RUF012

    def levels(self, items: Sequence[Item], cost: Cost) -> Levels:
        rise = self.values["rise"]
        reach = 1 + abs(rise)  # at level 0 no layer has zeros, at level 1 none is left out
        offset = [rise * (item.depth - 0.5) - abs(rise) / 2 for item in items]
        return lambda level: [level * reach + each for each in offset]

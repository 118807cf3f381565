"""Uniform: the same sparsity in every layer."""

from __future__ import annotations

from collections.abc import Sequence

from zeroskip.prune.budgets.base import Budget, Item, Levels
from zeroskip.prune.budgets.costs import Cost


class Uniform(Budget):
    """With an exact total: layers differ by one weight at most from what each alone would round to."""

    name = "uniform"

    def levels(self, items: Sequence[Item], cost: Cost) -> Levels:
        return lambda level: [level] * len(items)

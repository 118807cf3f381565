"""ERK: density in proportion to (outputs + inputs) / (outputs * inputs), so that small layers stay denser.

A convolution counts its kernel's sides among the dimensions. Layers that would be denser than dense are dense, and the
others make up for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from zeroskip.prune.budgets.base import Budget, Item, Levels
from zeroskip.prune.budgets.costs import Cost


class Erk(Budget):
    """Source: Erdős-Rényi-Kernel of Evci et al. 2020 (arXiv 1911.11134), section 3; for square layers it is uniform."""

    name = "erk"

    def levels(self, items: Sequence[Item], cost: Cost) -> Levels:
        raw = [_density(item) for item in items]
        enough = 1 / min(raw)  # the factor that makes every layer dense
        return lambda level: [1 - min(1.0, (1 - level) * enough * each) for each in raw]


def _density(item: Item) -> float:
    shape = item.site.tensor.shape
    return sum(shape) / math.prod(shape)

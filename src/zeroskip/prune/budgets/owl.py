"""OWL: blocks with more outliers stay denser.

With A = |W| * |x| (the norm of each input), the outliers of a block are the weights whose A is more than `factor`
times the mean A of the block; D is their share. Sparsity is a common level minus 2 * `spread` * the place of D between
the least and the greatest, recentred so that the mean over the weights is the level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from zeroskip.prune.base import Method
from zeroskip.prune.budgets.base import Budget, Item, Levels
from zeroskip.prune.budgets.costs import Cost


class Owl(Budget):
    """`factor` (M in the paper) and `spread` (lambda): no block is further than 2 * spread from another.

    Source: Yin et al. 2023 (arXiv 2310.05175), section 3; ours counts D over all weights of a block together.
    """

    name = "owl"
    options = {"spread": (0.08, 0.0, 0.5), "factor": (5.0, 1.0, 1000.0)}  # noqa: RUF012

    def needs(self, method: Method) -> tuple[str, ...]:
        return ("sumsq",)

    def levels(self, items: Sequence[Item], cost: Cost) -> Levels:
        shares = {block: self._outliers([i for i in items if i.block == block]) for block in {i.block for i in items}}
        low, high = min(shares.values()), max(shares.values())
        place = np.array([(shares[item.block] - low) / (high - low) if high > low else 0.5 for item in items])
        sizes = np.array([item.numel for item in items], dtype=float)
        offset = -2 * self.values["spread"] * (place - np.average(place, weights=sizes))
        down, up = float(offset.min()), float(offset.max())
        return lambda level: list(offset - up + level * (1 + up - down))

    def _outliers(self, items: list[Item]) -> float:
        total = sum(float(product.sum(dtype=product.dtype)) for product in _products(items))
        count = sum(item.numel for item in items if item.stats)
        limit = self.values["factor"] * total / max(count, 1)
        return sum(int((product > limit).sum()) for product in _products(items)) / max(count, 1)


def _products(items: list[Item]) -> Iterator[Tensor]:
    for item in items:
        if item.stats:
            yield item.site.weight().double().abs() * item.stats["sumsq"].double().sqrt().unsqueeze(1)

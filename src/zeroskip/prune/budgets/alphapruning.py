"""AlphaPruning: layers whose spectrum has a heavier tail are better trained, and stay denser.

Alpha is the exponent of the tail of the eigenvalues of W^T W, by Hill's estimator over the larger half: 1 + n / sum of
ln(eigenvalue / the smallest of that half). Its mean over a block is mapped to a factor in [1 - spread, 1 + spread] of a
common level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from zeroskip.prune.budgets.base import Budget, Item, Levels
from zeroskip.prune.budgets.costs import Cost


class AlphaPruning(Budget):
    """`spread` is epsilon in the paper. Needs no data, but the singular values of every layer.

    Source: Lu et al. 2024 (arXiv 2410.10912), section 3; ours keeps the total exact instead of rescaling to it.
    """

    name = "alphapruning"
    options = {"spread": (0.3, 0.0, 0.99)}  # noqa: RUF012

    def levels(self, items: Sequence[Item], cost: Cost) -> Levels:
        alphas = [float(np.mean([hill(matrix) for matrix in item.site.weight()])) for item in items]
        blocks = [item.block for item in items]
        mean = [float(np.mean([a for a, b in zip(alphas, blocks, strict=True) if b == block])) for block in blocks]
        low, high = min(mean), max(mean)
        spread = self.values["spread"] if high > low else 0.0
        factor = [1 - spread + 2 * spread * (each - low) / (high - low or 1.0) for each in mean]
        return lambda level: [level * each / (1 - spread) for each in factor]


def hill(weight: Tensor) -> float:
    """Return the tail exponent of the eigenvalues of W^T W, W [out, in]; zeros do not count."""
    values = torch.linalg.svdvals(weight.double()).square()
    values = values[values > values.max() * 1e-12].sort().values if values.numel() else values
    if len(values) < 2:
        return 1.0
    tail = values[len(values) // 2 :]
    spread = float((tail / tail[0]).log().sum())
    return 1 + (len(tail) - 1) / spread if spread > 0 else 1e3

"""Global: zeros go where they cost least, over all layers together.

Every layer has a curve: what its k cheapest zeros lose, by the score of its method, or by Wanda's where the method has
none of its own. The shares of zeros minimise the total loss + lambda * cost, with the one lambda that meets the target.
Where the cost is a count of weights, that is one threshold for the scores of all layers. Where it is bytes or
milliseconds, a layer that gains nothing by more zeros (no kernel of ours is faster than dense there) gets none, and
zeros go where they pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from zeroskip.prune.base import Method, Problem
from zeroskip.prune.budgets.base import Budget, Floats, Item, Levels
from zeroskip.prune.budgets.costs import Cost
from zeroskip.prune.patterns import Block, Pattern
from zeroskip.prune.site import of_group

POINTS = 4096  # of a curve; where a layer has fewer weights, every one of them


class ByScore(Budget):
    """`relative`: 1 divides the scores of a layer by their sum, so that a curve is the part of the layer that is lost.

    Source: global magnitude pruning (Han et al. 2015), and Lagrangian allocation as in rate-distortion theory.
    """

    name = "global"
    reads_scores = True
    options = {"relative": (1.0, 0.0, 1.0)}  # noqa: RUF012

    def needs(self, method: Method) -> tuple[str, ...]:
        return method.needs if _scores(method) else ("sumsq",)

    def levels(self, items: Sequence[Item], cost: Cost) -> Levels:
        shares, losses = zip(*(self._curve(item) for item in items), strict=True)
        costs = [cost.of(item, share) for item, share in zip(items, shares, strict=True)]
        steps = np.concatenate([-np.diff(each) for each in costs])
        gains = np.concatenate([np.diff(each) for each in losses])
        low = gains[gains > 0].min(initial=1.0) / max(1e-300, max(float(each[0]) for each in costs))
        high = max(float(each[-1]) for each in losses) / max(1e-300, steps[steps > 0].min(initial=np.inf))
        low, high = low / 4, max(high * 4, low)

        def at(level: float) -> list[float]:
            price = low * (high / low) ** level if level > 0 else 0.0
            best = [int(np.argmin(loss + price * each)) for loss, each in zip(losses, costs, strict=True)]
            return [float(share[index]) for share, index in zip(shares, best, strict=True)]

        return at

    def _curve(self, item: Item) -> tuple[Floats, Floats]:
        """Return rising shares of zeros and what they lose."""
        scores = _score(item)
        total = float(scores.sum(dtype=torch.float64))
        unit = total if self.values["relative"] and total > 0 else 1.0
        if item.steps is not None:
            shares = np.asarray(item.steps)
            return shares, np.array([_lost(scores, item.settings.pattern, share) for share in shares]) / unit
        kept = cast(Block, item.settings.pattern)
        rows, columns = scores.shape[1] // kept.height, scores.shape[2] // kept.width
        blocks = scores.view(-1, rows, kept.height, columns, kept.width).sum((2, 4)).view(-1)
        summed = np.concatenate([[0.0], blocks.sort().values.double().cumsum(0).numpy()])
        points = np.unique(np.linspace(0, len(summed) - 1, min(POINTS, len(summed) - 1) + 1).round().astype(int))
        return points / (len(summed) - 1), summed[points] / unit


def _lost(scores: Tensor, pattern: Pattern, share: float) -> float:
    if share == 0 or pattern.steps is None:
        return 0.0
    fewer = pattern.with_kept(round((1 - share) * pattern.steps))
    return sum(float(score[~fewer.select(score, share)].sum(dtype=torch.float64)) for score in scores)


def _scores(method: Method) -> bool:
    """Whether the method chooses by a score."""
    return type(method).run is Method.run


def _score(item: Item) -> Tensor:
    """[groups, out, in]"""
    method, weight = item.settings.composition.method, item.site.weight().float()
    if not _scores(method):
        return weight.square() * item.stats["sumsq"].unsqueeze(1)
    parts = []
    for group, matrix in enumerate(weight):
        stats, _ = of_group(item.stats, group, 1)
        draw = torch.Generator(matrix.device).manual_seed(0)
        problem = Problem(item.site.name, matrix, item.settings.pattern, item.settings.sparsity, stats, draw)
        parts.append(method.score(problem).float())
    return torch.stack(parts)

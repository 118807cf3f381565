"""From curves and a target to a number of zeros for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zeroskip.errors import ZeroskipError
from zeroskip.prune.budgets.base import Budget, Item
from zeroskip.prune.budgets.costs import Cost, Params
from zeroskip.prune.budgets.target import Target

__all__ = ["Outcome", "solve"]

STEPS = 80  # of a bisection: further than doubles can tell apart
SLACK = 1e-9


@dataclass(frozen=True)
class Outcome:
    """What a budget decided.

    Attributes
    ----------
    zeros : list of int
        Of each free layer.
    dense, asked, reached : float
        The total cost of all layers without zeros, the one that was asked for, and the one with these zeros, in the
        unit of the target (weights, where it is a sparsity).
    """

    zeros: list[int]
    dense: float
    asked: float
    reached: float


def solve(budget: Budget, target: Target, cost: Cost, free: Sequence[Item], fixed: Sequence[Item]) -> Outcome:
    """Decide how many zeros each of the `free` layers gets.

    The level at which the curves of the budget just meet the target is found by bisection; between it and the level
    just above the target, one layer after another is taken over, so the total misses the target by less than what one
    step of one layer costs. Counts of weights are then brought to the target exactly, the largest remainder first.

    Parameters
    ----------
    free : sequence of Item
        Those the budget decides on.
    fixed : sequence of Item
        Those that count with the zeros they have or get anyway.

    Raises
    ------
    ZeroskipError
        Where even the most zeros that are allowed do not reach the target.
    """
    least, most = budget.values["least"], budget.values["most"]
    curves = budget.levels(free, cost)

    def at(level: float) -> list[float]:
        return [_allowed(item, share, least, most) for item, share in zip(free, curves(level), strict=True)]

    def price(shares: Sequence[float]) -> float:
        return sum(float(cost.of(item, np.array([share]))[0]) for item, share in zip(free, shares, strict=True))

    rest = sum(float(cost.of(item, np.array([item.settings.sparsity]))[0]) for item in fixed)
    zeros_wanted = None
    dense = price([0.0] * len(free)) + sum(float(cost.of(item, np.zeros(1))[0]) for item in fixed)
    if target.unit == "sparsity":
        total = sum(
            item.numel for item in (*free, *(item for item in fixed if item.settings.composition.method.chooses))
        )
        zeros_wanted = round(total * target.amount) - sum(
            round(item.numel * item.settings.sparsity) for item in fixed if item.settings.composition.method.chooses
        )
        wanted = float(sum(item.numel for item in free) - zeros_wanted)
    else:
        wanted = (target.amount * dense if target.relative else target.amount) - rest
        if isinstance(cost, Params):
            zeros_wanted = sum(item.numel for item in free) - int(np.floor(wanted + SLACK))
    slack = SLACK * max(1.0, abs(wanted))
    lowest, highest = price(at(1.0)), price(at(0.0))
    possible = lowest <= wanted + slack if zeros_wanted is None else _within_reach(free, zeros_wanted, most)
    if not possible:
        raise ZeroskipError(
            f"target: {target.unit} {_said(target)} is out of reach: with at most {most:g} zeros in a layer "
            f"{lowest + rest:.6g} is left, and {wanted + rest:.6g} is asked for"
        )
    if target.unit != "sparsity" and zeros_wanted is not None and wanted + rest > dense + slack:
        raise ZeroskipError(f"target: {target.unit} {_said(target)} is more than the dense model has, {dense:.6g}")
    if zeros_wanted is not None and zeros_wanted < 0:
        raise ZeroskipError(f"target: {target.unit} {_said(target)} is met with fewer zeros than rules ask for")
    shares = at(0.0)
    if highest > wanted + slack:
        low, high = 0.0, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if price(at(middle)) <= wanted + slack else (middle, high)
        shares = _between(free, at(low), at(high), cost, wanted + slack)
    if zeros_wanted is not None:
        zeros = _exactly(free, shares, zeros_wanted, least, most)
    else:
        zeros = _given_back(free, shares, cost, wanted + slack)
    reached = price([count / item.numel for count, item in zip(zeros, free, strict=True)])
    return Outcome(zeros, dense, wanted + rest, reached + rest)


def _given_back(free: Sequence[Item], shares: list[float], cost: Cost, wanted: float) -> list[int]:
    """Round up to whole units, then take back those that the target does not need."""
    zeros = [_units(item, share, np.ceil) * item.unit for item, share in zip(free, shares, strict=True)]
    prices = [float(cost.of(item, np.array([z / item.numel]))[0]) for item, z in zip(free, zeros, strict=True)]
    for i, item in enumerate(free):
        if item.steps is None and zeros[i] - item.unit >= 0:
            fewer = float(cost.of(item, np.array([(zeros[i] - item.unit) / item.numel]))[0])
            if sum(prices) - prices[i] + fewer <= wanted:
                zeros[i], prices[i] = zeros[i] - item.unit, fewer
    return zeros


def _between(free: Sequence[Item], above: list[float], below: list[float], cost: Cost, wanted: float) -> list[float]:
    """Take over layer after layer from shares that cost too much to shares that do not; share the last one out."""
    shares = list(above)
    prices = [float(cost.of(item, np.array([share]))[0]) for item, share in zip(free, shares, strict=True)]
    for index, item in enumerate(free):
        after = float(cost.of(item, np.array([below[index]]))[0])
        if sum(prices) - prices[index] + after > wanted:
            shares[index], prices[index] = below[index], after
            continue
        room = wanted - (sum(prices) - prices[index])
        if item.steps is None:
            low, high = above[index], below[index]
            for _ in range(STEPS):
                middle = (low + high) / 2
                fits = float(cost.of(item, np.array([middle]))[0]) <= room
                low, high = (low, middle) if fits else (middle, high)
            shares[index] = high
        else:
            shares[index] = next(
                float(step)
                for step in item.steps
                if above[index] <= step <= below[index] and float(cost.of(item, np.array([step]))[0]) <= room
            )
        break
    return shares


def _exactly(free: Sequence[Item], shares: list[float], wanted: int, least: float, most: float) -> list[int]:
    """Round to whole units whose sum is as asked, as nearly as the units allow."""
    zeros = [_units(item, share, np.floor) * item.unit for item, share in zip(free, shares, strict=True)]
    loose = [i for i, item in enumerate(free) if item.steps is None]
    for sign in (1, -1):
        bound = [
            _units(free[i], most if sign > 0 else least, np.floor if sign > 0 else np.ceil) for i in range(len(free))
        ]
        order = sorted(loose, key=lambda i: sign * (zeros[i] - shares[i] * free[i].numel) / free[i].unit)
        moved = True
        while moved and sign * (wanted - sum(zeros)) > 0:
            moved = False
            for i in order:
                missing = sign * (wanted - sum(zeros))
                step = free[i].unit
                inside = sign * (bound[i] * step - zeros[i]) >= step
                if inside and (missing >= step or (missing * 2 > step and _finest(free, loose) == step)):
                    zeros[i] += sign * step
                    moved = True
    return zeros


def _finest(free: Sequence[Item], loose: Sequence[int]) -> int:
    return min(free[i].unit for i in loose)


def _units(item: Item, share: float, to_whole: np.ufunc) -> int:
    """How many whole units a share is; a share that is a whole number of units up to rounding is that number."""
    exact = share * item.numel / item.unit
    near = round(exact)
    return near if abs(exact - near) < 1e-6 * max(1.0, exact * 1e-6) else int(to_whole(exact))


def _allowed(item: Item, share: float, least: float, most: float) -> float:
    """The share that the layer can have: within the bounds, and one of its steps, the nearest."""
    share = min(max(share, least), most)
    if item.steps is None:
        return share
    steps = item.steps[(item.steps >= least - SLACK) & (item.steps <= most + SLACK)]
    if not len(steps):
        raise ZeroskipError(
            f"{item.site.name}: {item.settings.pattern.name} has no sparsity between {least:g} and {most:g}"
        )
    return float(steps[np.abs(steps - share).argmin()])


def _within_reach(items: Sequence[Item], wanted: int, most: float) -> bool:
    """Whether so many zeros, give or take half a unit, fit into the layers."""
    room = [_units(item, _allowed(item, most, 0.0, most), np.floor) * item.unit for item in items]
    return wanted <= sum(room) + max(item.unit for item in items) // 2


def _said(target: Target) -> str:
    return f"{target.amount:.4g}" if not target.relative else f"{100 * target.amount:g}%"

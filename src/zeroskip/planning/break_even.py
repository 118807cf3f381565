"""How sparse a weight of this shape has to be before a format beats the best dense layer here: measured, not modelled.

Random weights of the same shape at a few sparsities race against the fastest dense layouts, with cold weights; where
the speed-up crosses 1 the sparsity is interpolated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from zeroskip.bench.timer import Race, race
from zeroskip.formats import names
from zeroskip.formats.blob import VALUES
from zeroskip.planning.candidates import DENSE_FORMATS, Call, Layout, copies_for, format_layout, layouts
from zeroskip.planning.machine import cold_bytes
from zeroskip.planning.measure import bound

__all__ = ["BreakEven", "break_even", "crossing"]

UNSTRUCTURED = (0.5, 0.7, 0.8, 0.9, 0.95)
KEPT_OF_16 = (12, 8, 6, 4, 2)
STRIP = 64


@dataclass(frozen=True)
class BreakEven:
    """One format, one shape, one token count.

    Attributes
    ----------
    format, values : str
    pattern : str
        Of the synthetic zeros: ``'unstructured'`` or ``'N:16@64'``.
    tokens : int
    curve : {sparsity: speed-up}
        Against the fastest dense layout of the same race.
    sparsity : float or None
        Where the speed-up reaches 1; None if it does not up to the highest sparsity tried. If the lowest tried is
        already faster, that one (the crossing lies at it or below).
    """

    format: str
    values: str
    pattern: str
    tokens: int
    curve: dict[float, float]
    sparsity: float | None

    def __str__(self) -> str:
        if self.sparsity is None:
            return f"> {max(self.curve):.0%}"
        return f"<= {self.sparsity:.0%}" if self.sparsity == min(self.curve) else f"{self.sparsity:.0%}"


def crossing(curve: Mapping[float, float]) -> float | None:
    """Return the sparsity at which a measured speed-up first reaches 1, interpolated between the points.

    Examples
    --------
    >>> crossing({0.5: 0.8, 0.7: 1.2, 0.9: 2.0})
    0.6
    """
    points = sorted(curve.items())
    if points[0][1] >= 1.0:
        return points[0][0]
    for (low, slow), (high, fast) in pairwise(points):
        if fast >= 1.0:
            return round(low + (high - low) * (1.0 - slow) / (fast - slow), 3)
    return None


def break_even(
    shape: tuple[int, int], values: str, tokens: tuple[int, ...], working_set_bytes: int, budget_s: float = 0.4
) -> list[BreakEven]:
    """Measure the break-even of every sparse format for weights [m, k] of this shape.

    Parameters
    ----------
    shape : (m, k)
    values : str
        Storage of the sparse and of the dense layouts; a format that does not store it has no break-even.
    tokens : tuple of int
    working_set_bytes : int
        Of the model's weights, so that they are found as cold as they are there.
    budget_s : float
        Seconds for each format at each token count.
    """
    dtype = VALUES.get(values, torch.float32)
    found: list[BreakEven] = []
    with torch.inference_mode():
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
        layer.weight.data = weight
        dense = [one for one in layouts(layer, weight, None, (values,), max(tokens))[0] if one.dense]
        for name in names():
            if name in DENSE_FORMATS:
                continue
            levels = _levels(name, weight, values)
            for count in tokens if levels else ():
                x = torch.randn(count, shape[1]).to(dtype)
                curve = _race(dense, levels, x, min(working_set_bytes, cold_bytes()), budget_s)
                pattern = next(iter(levels.values()))[0]
                found.append(BreakEven(name, values, pattern, count, curve, crossing(curve)))
    return found


def _levels(name: str, weight: Tensor, values: str) -> dict[float, tuple[str, Layout]]:
    """Return {sparsity: (pattern, layout)} of random zeros that the format holds; unstructured ones if it can."""
    for family in (_unstructured, _strips):
        levels: dict[float, tuple[str, Layout]] = {}
        for sparsity, pattern, sparse in family(weight):
            layout = format_layout(name, sparse, None, values)
            if isinstance(layout, str):
                break
            layout.kernels = layout.kernels[:1]  # the best guess; the sites themselves are measured with all
            layout.label = f"{sparsity}"
            levels[sparsity] = (pattern, layout)
        if levels:
            return levels
    return {}


def _unstructured(weight: Tensor) -> Iterator[tuple[float, str, Tensor]]:
    draw = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
    for sparsity in UNSTRUCTURED:
        yield sparsity, "unstructured", weight * (draw >= sparsity)


def _strips(weight: Tensor) -> Iterator[tuple[float, str, Tensor]]:
    rows, k = weight.shape
    if k % 16:
        return
    strips = -(-rows // STRIP)
    order = torch.rand(strips, k // 16, 16, generator=torch.Generator().manual_seed(2)).argsort(-1).argsort(-1)
    for kept in KEPT_OF_16:
        mask = (order < kept).view(strips, k).repeat_interleave(STRIP, dim=0)[:rows]
        yield 1.0 - kept / 16, f"N:16@{STRIP}", weight * mask


def _race(
    dense: list[Layout], levels: Mapping[float, tuple[str, Layout]], x: Tensor, working_set: int, budget_s: float
) -> dict[float, float]:
    field_of: list[tuple[Layout, str, list[Call]]] = list(
        copies_for([*dense, *(layout for _, layout in levels.values())], working_set)
    )
    runners: dict[str, list[Callable[[], object]]] = {}
    rivals: list[str] = []
    for layout, kernel, calls in field_of:
        name = f"{layout.label}/{kernel}"
        runners[name] = [bound(call, x) for call in calls]
        if layout.dense:
            rivals.append(name)
    seen = race(runners, budget_s=budget_s, min_rounds=7, settled=_settled(rivals), core=rivals)
    best = seen.median(seen.fastest(rivals))
    medians = {name.partition("/")[0]: seen.median(name) for name in seen.names if name not in rivals}
    return {sparsity: round(best / medians[str(sparsity)], 4) for sparsity in levels}


def _settled(rivals: list[str]) -> Callable[[Race], bool]:
    def settled(seen: Race) -> bool:
        best = seen.fastest(rivals)
        ratios = [seen.ratio(best, name) for name in seen.running if name not in rivals]
        return all(ratio.noise < 0.04 or ratio.low > 1.2 or ratio.high < 0.8 for ratio in ratios)

    return settled

"""From how many zeros on a sparse layout wins, read off the rows of a benchmark that has several sparsities of a shape.

The speed-ups of the shapes that have every sparsity are averaged (geometric mean); where the mean crosses 1 the
sparsity is interpolated. Nothing is measured here: `zeroskip analyze` measures a model's own shapes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from zeroskip.bench.results import Row
from zeroskip.planning.break_even import BreakEven, crossing

__all__ = ["BEST", "Against", "break_evens"]

BEST = "best dense"
STRIPS = "strips"
Key = tuple[str, str, str, int, int, str]  # format, values, zeros, tokens, threads, rival


@dataclass(frozen=True)
class Against:
    """Where one layout crosses one rival.

    Attributes
    ----------
    threads : int
    rival : str
        Our dense layout of the same values, or ``'best dense'``.
    shapes : int
        Over which the curve is the mean.
    found : BreakEven
        Layout, tokens, the curve {sparsity: speed-up} and where it crosses 1.
    """

    threads: int
    rival: str
    shapes: int
    found: BreakEven

    def __str__(self) -> str:
        curve = ", ".join(f"{sparsity:.0%} {speed:.2f}x" for sparsity, speed in sorted(self.found.curve.items()))
        return f"{self.found} ({curve})"


def break_evens(rows: Iterable[Row]) -> list[Against]:
    """Return the break-even of each sparse layout at each token and thread count, against each of its two rivals.

    Unstructured zeros and strips are kept apart. A layout that was measured at one sparsity only is left out.
    """
    speeds: defaultdict[Key, defaultdict[str, defaultdict[float, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in rows:
        if row.role != "ours" or row.dense or row.ms is None:
            continue
        family = STRIPS if "@" in row.pattern else row.pattern
        for rival in (f"dense {row.values}", BEST):
            if rival in row.faster_than:
                key = (row.format, row.values, family, row.tokens, row.threads, rival)
                shape = f"{row.model} {row.m}x{row.k}"
                speeds[key][shape][round(row.sparsity, 2)].append(row.faster_than[rival].value)
    found: list[Against] = []
    for (name, values, family, tokens, threads, rival), shapes in sorted(speeds.items()):
        every = max((frozenset(curve) for curve in shapes.values()), key=lambda levels: (len(levels), sorted(levels)))
        if len(every) < 2:
            continue
        whole = [curve for curve in shapes.values() if every <= set(curve)]
        mean = {s: _mean([speed for curve in whole for speed in curve[s]]) for s in sorted(every)}
        one = BreakEven(name, values, family, tokens, mean, crossing(mean))
        found.append(Against(threads, rival, len(whole), one))
    return found


def _mean(speeds: list[float]) -> float:
    return math.exp(math.fsum(map(math.log, speeds)) / len(speeds))

"""The geometry of the page's two drawings; the template makes SVG of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from zeroskip.report.places import Grid

__all__ = ["Chart", "Line", "Tick", "error_chart"]

WIDTH, HEIGHT = 860.0, 300.0  # of the plot without its margins


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """The errors of one kind of sites, before the solve and after it: [(x, y, title), ...] in pixels."""

    name: str
    colour: int
    before: list[tuple[float, float, str]]
    after: list[tuple[float, float, str]]

    @property
    def before_path(self) -> str:
        return _path(self.before)

    @property
    def after_path(self) -> str:
        return _path(self.after)


@dataclass(frozen=True)
class Chart:
    """Errors by block on a logarithmic scale."""

    width: float
    height: float
    across: list[Tick]
    up: list[Tick]
    lines: list[Line]


def error_chart(found: Grid) -> Chart | None:
    """Place the errors of all sites; None where no method measured any."""
    known = [
        value
        for cell in found.cells
        for site in cell.sites
        for value in (site.error_before, site.error)
        if value is not None and value > 0
    ]
    if not known:
        return None
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    high = max(high, low + 1)

    def x(block: int) -> float:
        return round(WIDTH * (block + 0.5) / len(found.blocks), 1)

    def y(value: float) -> float:
        return round(HEIGHT * (high - math.log10(value)) / (high - low), 1)

    def points(kind: int, which: str) -> list[tuple[float, float, str]]:
        out = []
        for cell in found.cells:
            for site in cell.sites if cell.column == kind else ():
                value: Any = getattr(site, which)
                if value is not None and value > 0:
                    out.append((x(cell.row), y(value), f"{site.name}: {value:.3g}"))
        return out

    lines = [Line(kind, at, points(at, "error_before"), points(at, "error")) for at, kind in enumerate(found.kinds)]
    step = max(1, -(-len(found.blocks) // 24))
    across = [Tick(x(at), block) for at, block in enumerate(found.blocks) if at % step == 0]
    up = [Tick(y(10.0**power), f"{10.0**power:g}") for power in range(low, high + 1)]
    return Chart(WIDTH, HEIGHT, across, up, [line for line in lines if line.after])


def _path(points: list[tuple[float, float, str]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y, _ in points)

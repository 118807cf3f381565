"""Where a site stands in its model: the block, and which of the block's sites it is, both read off its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zeroskip.prune.report import Row

__all__ = ["Cell", "Grid", "grid", "place"]


def place(name: str) -> tuple[str, str]:
    """Split "model.layers.3.mlp.experts.7.up" into ("model.layers.3", "mlp.experts.*.up").

    The first number ends the block; later ones count sites of one kind. Without a number there is no block.
    """
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return "", name
    return ".".join(parts[: at + 1]), ".".join("*" if part.isdigit() else part for part in parts[at + 1 :])


@dataclass(frozen=True)
class Cell:
    """The sites of one kind in one block: where they stand in the grid, and the rows of the report."""

    row: int
    column: int
    sites: tuple[Row, ...]

    @property
    def sparsity(self) -> float:
        sizes = [site.shape[0] * site.shape[1] * site.shape[2] for site in self.sites]
        return sum(site.sparsity * size for site, size in zip(self.sites, sizes, strict=True)) / max(1, sum(sizes))

    @property
    def title(self) -> str:
        first = self.sites[0]
        name = first.name if len(self.sites) == 1 else f"{first.name} and {len(self.sites) - 1} more"
        return f"{name}: {self.sparsity:.2%} zeros, {first.sparsity_asked:.2%} asked"


@dataclass(frozen=True)
class Grid:
    """The model as blocks by kinds of sites."""

    blocks: list[str]
    kinds: list[str]
    cells: list[Cell]

    # In pixels of the drawing: where its columns and rows begin, and how wide a column is.

    @property
    def left(self) -> int:
        return 10 + 7 * max(map(len, self.blocks), default=0)

    @property
    def top(self) -> int:
        return 30 + 4 * max(map(len, self.kinds), default=0)

    @property
    def step(self) -> int:
        return max(8, min(64, 900 // max(1, len(self.kinds))))


def grid(rows: Sequence[Row]) -> Grid:
    """Sort the rows of a report into a grid, blocks and kinds in the order in which they come."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault(place(row.name), []).append(row)
    blocks = list(dict.fromkeys(block for block, _ in found))
    kinds = list(dict.fromkeys(kind for _, kind in found))
    cells = [Cell(blocks.index(block), kinds.index(kind), tuple(sites)) for (block, kind), sites in found.items()]
    return Grid(blocks, kinds, cells)

"""What a budget is: a curve for every layer from one common level to its share of zeros. Subclassing registers it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from zeroskip.errors import ZeroskipError, suggest
from zeroskip.model import Site
from zeroskip.prune.base import Method
from zeroskip.prune.patterns import Block
from zeroskip.prune.settings import Settings

if TYPE_CHECKING:
    from zeroskip.prune.budgets.costs import Cost

__all__ = ["Budget", "Floats", "Item", "Levels", "budgets"]

Floats = NDArray[np.float64]
Levels = Callable[[float], Sequence[float]]
"""level in [0, 1] -> the sparsity of each item, none of which falls as the level rises."""


@dataclass(frozen=True)
class Item:
    """A layer, as budgets and costs see it.

    Attributes
    ----------
    site : Site
    settings : Settings
        Those of a layer that a budget decides on say all but how many zeros.
    block : str
        The block it lies in; where the model is one block, its own name.
    depth : float
        Where that block stands, from 0 (first) to 1 (last).
    uses : float
        How often it is applied to one input of the model.
    stats : mapping
        What `Budget.needs` asked for, {statistic: [groups, ...]}; empty where no token reached the layer.
    """

    site: Site
    settings: Settings
    block: str = ""
    depth: float = 0.0
    uses: float = 1.0
    stats: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return math.prod(self.site.shape)

    @property
    def unit(self) -> int:
        """How many weights become zero together."""
        pattern = self.settings.pattern
        return pattern.height * pattern.width if isinstance(pattern, Block) else 1

    @property
    def steps(self) -> Floats | None:
        """The sparsities that its pattern can have, rising, or None where every unit counts."""
        of = self.settings.pattern.steps
        return None if of is None else np.arange(of) / of


class Budget:
    """A way to share zeros among layers. A subclass sets `name`, `options` and writes `levels`.

    Attributes
    ----------
    options : dict
        {name of an option: (default, smallest, largest)}.
    reads_scores : bool
        Whether it wants what the surveys of methods found.
    """

    known: ClassVar[dict[str, type[Budget]]] = {}
    reads_scores: ClassVar[bool] = False
    name: ClassVar[str]
    options: ClassVar[dict[str, tuple[float, float, float]]] = {}
    common: ClassVar[dict[str, tuple[float, float, float]]] = {"least": (0.0, 0.0, 1.0), "most": (0.99, 0.0, 0.9999)}

    def __init_subclass__(cls) -> None:
        Budget.known[cls.name] = cls

    def __init__(self, values: Mapping[str, float]) -> None:
        self.values = values

    @staticmethod
    def read(given: Any) -> Budget:
        """Read a name, or {"name": ..., option: ...}.

        Raises
        ------
        ZeroskipError
            On an unknown name or option, or a value that is no number in its range.
        """
        entries = {"name": given} if isinstance(given, str) else given
        if not isinstance(entries, Mapping) or not isinstance(entries.get("name"), str):
            raise ZeroskipError(f"budget is {given!r}: give a name such as 'owl', or a map {{name: owl, ...}}")
        kind = Budget.known.get(entries["name"])
        if kind is None:
            raise ZeroskipError(f"unknown budget {entries['name']!r}" + suggest(entries["name"], Budget.known))
        options = kind.options | Budget.common
        values = {name: default for name, (default, _, _) in options.items()}
        for key, value in entries.items():
            if key == "name":
                continue
            if key not in options:
                raise ZeroskipError(f"budget {kind.name!r} has no option {key!r}" + suggest(str(key), options))
            _, low, high = options[key]
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ZeroskipError(f"budget {kind.name!r}: {key} is {value!r}: give a number in [{low:g}, {high:g}]")
            values[key] = value
        if values["least"] > values["most"]:
            raise ZeroskipError(
                f"budget {kind.name!r}: least is {values['least']:g}, more than most, {values['most']:g}"
            )
        return kind(values)

    def needs(self, method: Method) -> tuple[str, ...]:
        """Return the statistics of the dense model that it needs of layers with this method."""
        return ()

    def levels(self, items: Sequence[Item], cost: Cost) -> Levels:
        """Return the curves of these layers."""
        raise NotImplementedError


def budgets() -> list[str]:
    """Return the names that `budget` takes in a recipe."""
    return list(Budget.known)

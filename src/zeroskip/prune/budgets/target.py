"""What a budget has to reach: {"sparsity": 0.6}, {"params": "40%"}, {"bytes": 4e6}, {"ms": 12.0, "tokens": 32}."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zeroskip.errors import ZeroskipError, suggest
from zeroskip.prune.budgets.costs import Cost, Params

__all__ = ["Target"]


@dataclass(frozen=True)
class Target:
    """A total over all layers that a recipe looks at; of sparsity, over those that get their zeros from it.

    Attributes
    ----------
    unit : str
        "sparsity" or the name of a `Cost`.
    amount : float
    relative : bool
        Whether the amount is a part of what the dense layers cost.
    options : mapping
    """

    unit: str
    amount: float
    relative: bool
    options: Mapping[str, Any]

    @staticmethod
    def read(given: Any) -> Target:
        """Read one unit with its amount, a number or a text such as "40%" of dense, and the options of that unit.

        Raises
        ------
        ZeroskipError
            On none or two units, an unknown entry, an amount out of range.
        """
        units = ("sparsity", *Cost.known)
        if not isinstance(given, Mapping):
            raise ZeroskipError(f"target is {given!r}: give a map such as {{sparsity: 0.6}} or {{ms: 12, tokens: 32}}")
        found = [key for key in given if key in units]
        known = [*units, *(Cost.known[found[0]].options if found and found[0] in Cost.known else ())]
        for key in given:
            if key not in known:
                raise ZeroskipError(f"target has an unknown entry {key!r}" + suggest(str(key), known))
        if len(found) != 1:
            seen = "no unit" if not found else " and ".join(found)
            raise ZeroskipError(f"target names {seen}: give one of {', '.join(units)}")
        unit, amount = found[0], given[found[0]]
        percent = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?%", amount) if isinstance(amount, str) else None
        if percent is not None and unit != "sparsity":
            value, relative = float(percent[1]) / 100, True
        elif isinstance(amount, bool) or not isinstance(amount, int | float) or not math.isfinite(amount):
            raise ZeroskipError(
                f"target: {unit} is {amount!r}: give a number" + ("" if unit == "sparsity" else " or '40%'")
            )
        else:
            value, relative = float(amount), False
        if unit == "sparsity" and not 0 <= value < 1:
            raise ZeroskipError(f"target: sparsity is {amount!r}: give a fraction of zeros in [0, 1)")
        if value <= 0 and unit != "sparsity":
            raise ZeroskipError(f"target: {unit} is {amount!r}: give more than 0")
        if relative and value > 1:
            raise ZeroskipError(f"target: {unit} is {amount!r}: more than the dense model has; give up to '100%'")
        options = {key: value for key, value in given.items() if key != unit}
        target = Target(unit, value, relative, options)
        target.cost()  # reads the options
        return target

    def cost(self) -> Cost:
        """Return what measures it."""
        return Params({}) if self.unit == "sparsity" else Cost.known[self.unit](self.options)

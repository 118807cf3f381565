"""What is done to one site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zeroskip.errors import ZeroskipError, suggest
from zeroskip.model import Site
from zeroskip.prune.base import Integers
from zeroskip.prune.composition import Composition
from zeroskip.prune.patterns import Pattern
from zeroskip.quantize import GROUPS, LIMIT

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What is done to one site.

    Attributes
    ----------
    composition : Composition
    pattern : Pattern
    sparsity : float
        Fraction of zeros in [0, 1); 0 where the method keeps the zeros that are there.
    integers : Integers or None
        For methods that quantise.
    """

    composition: Composition
    pattern: Pattern
    sparsity: float
    integers: Integers | None

    @staticmethod
    def read(values: Mapping[str, Any]) -> Settings:
        """Read plain values: {"method", "pattern", "sparsity", "values", "group_size"}, the last three may be None.

        Raises
        ------
        ZeroskipError
            On an unknown name, and where one of them contradicts another.
        """
        composition = Composition.parse(values["method"])
        pattern = Pattern.parse(values["pattern"])
        if not composition.method.serves(pattern):
            raise ZeroskipError(
                f"method {composition.name!r} cannot serve pattern {pattern.name!r}: take another of either"
            )
        if composition.method.chooses:
            sparsity = _sparsity(values["sparsity"], pattern)
        elif values["sparsity"] is None:
            sparsity = 0.0
        else:
            raise ZeroskipError(f"method {composition.name!r} keeps the zeros that are there: leave sparsity out")
        return Settings(composition, pattern, sparsity, _integers(composition, values["values"], values["group_size"]))

    def to_dict(self) -> dict[str, Any]:
        """Return the values from which `read` makes the same."""
        integers = self.integers
        return {
            "method": self.composition.name,
            "pattern": self.pattern.name,
            "sparsity": self.sparsity if self.composition.method.chooses else None,
            "values": None if integers is None else integers.values,
            "group_size": None if integers is None else integers.group_size,
        }

    def check(self, site: Site) -> None:
        """Raise unless the site can hold the pattern, has finite weights, and inputs with the statistics needed."""
        weight = site.weight()
        if weight.is_meta:
            raise ZeroskipError(f"{site.label}: its weight is not loaded (meta device)")
        if weight.element_size() < 2:
            raise ZeroskipError(f"{site.label}: its weight is {weight.dtype}; convert the model, such as .bfloat16()")
        self.pattern.check(site.grid, site.label)
        known = site.adapter.statistics
        if known is not None and not set(self.composition.needs) <= set(known):
            raise ZeroskipError(
                f"{site.label}: method {self.composition.name!r} needs inputs that correlate, which those of "
                f"{_article(site)} do not: take 'magnitude' or 'wanda' for it"
            )
        if not bool(torch.isfinite(weight).all()):
            raise ZeroskipError(f"{site.label}: its weight holds NaN or Inf")


def _article(site: Site) -> str:
    kind = type(site.module).__name__
    return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"


def _integers(composition: Composition, values: Any, group_size: Any) -> Integers | None:
    if not composition.method.quantizes:
        if values is not None or group_size is not None:
            raise ZeroskipError(f"method {composition.name!r} does not quantise: leave values and group_size out")
        return None
    values = "int4" if values is None else values
    group_size = 64 if group_size is None else group_size
    if not isinstance(values, str) or values not in LIMIT:
        raise ZeroskipError(f"unknown integer type {values!r}" + suggest(str(values), LIMIT))
    if isinstance(group_size, bool) or group_size not in GROUPS:
        raise ZeroskipError(f"group_size is {group_size!r}: one scale serves 32, 64 or 128 inputs")
    return Integers(values, int(group_size))


def _sparsity(sparsity: Any, pattern: Pattern) -> float:
    implied = pattern.sparsity
    if sparsity is None:
        if implied is None:
            raise ZeroskipError(f"pattern {pattern.name!r} needs a sparsity: give a fraction of zeros in [0, 1)")
        return implied
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ZeroskipError(f"sparsity is {sparsity!r}: give a fraction of zeros in [0, 1)")
    if implied is not None and not math.isclose(sparsity, implied, abs_tol=1e-9):
        raise ZeroskipError(f"pattern {pattern.name!r} has sparsity {implied:g}, not {sparsity:g}: leave sparsity out")
    return float(sparsity)

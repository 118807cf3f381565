"""What a run was asked to do, read and checked before anything moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zeroskip.errors import ZeroskipError, suggest
from zeroskip.model import Site, site_patterns
from zeroskip.prune.base import Integers, Recipe
from zeroskip.prune.patterns import Pattern
from zeroskip.quantize import GROUPS, LIMIT

__all__ = ["Plan", "check_sites", "read_plan"]

DEFAULTS: dict[str, Any] = {
    "method": "wanda+ls",
    "sparsity": None,
    "pattern": "unstructured",
    "include": None,
    "exclude": ("lm_head",),
    "seed": 0,
    "values": None,
    "group_size": None,
}


@dataclass(frozen=True)
class Plan:
    """A run: `settings` holds the JSON values that reproduce it, the rest what they mean."""

    settings: dict[str, Any]
    recipe: Recipe
    pattern: Pattern
    sparsity: float
    integers: Integers | None


def read_plan(given: dict[str, Any], recipe: Mapping[str, Any] | None) -> Plan:
    """Merge the arguments of `prune` with its `recipe=`, which may not contradict them, and read the names in them."""
    settings = dict(given)
    if recipe is not None:
        if not isinstance(recipe, Mapping):
            raise ZeroskipError(f"recipe is a {type(recipe).__name__}: give a dict")
        for key, value in recipe.items():
            if key not in DEFAULTS:
                raise ZeroskipError(f"recipe has an unknown entry {key!r}" + suggest(str(key), DEFAULTS))
            if given[key] not in (DEFAULTS[key], value):
                raise ZeroskipError(f"{key} is {given[key]!r}, and {value!r} in the recipe: leave one out")
            settings[key] = value
    for key in ("include", "exclude"):
        settings[key] = None if settings[key] is None else list(site_patterns(key, settings[key]))
    if not isinstance(settings["seed"], int):
        raise ZeroskipError(f"seed is {settings['seed']!r}: give an integer")
    composition = Recipe.parse(settings["method"])
    pattern = Pattern.parse(settings["pattern"])
    if not composition.method.serves(pattern):
        raise ZeroskipError(
            f"method {composition.name!r} cannot serve pattern {pattern.name!r}: take another of either"
        )
    if composition.method.chooses:
        settings["sparsity"] = sparsity = _sparsity(settings["sparsity"], pattern)
    elif settings["sparsity"] is None:
        sparsity = 0.0
    else:
        raise ZeroskipError(f"method {composition.name!r} keeps the zeros that are there: leave sparsity out")
    integers = _integers(composition, settings["values"], settings["group_size"])
    if integers is not None:
        settings["values"], settings["group_size"] = integers.values, integers.group_size
    return Plan(settings, composition, pattern, sparsity, integers)


def _integers(recipe: Recipe, values: Any, group_size: Any) -> Integers | None:
    if not recipe.method.quantizes:
        if values is not None or group_size is not None:
            raise ZeroskipError(f"method {recipe.name!r} does not quantise: leave values and group_size out")
        return None
    values = "int4" if values is None else values
    group_size = 64 if group_size is None else group_size
    if values not in LIMIT:
        raise ZeroskipError(f"unknown integer type {values!r}" + suggest(str(values), LIMIT))
    if group_size not in GROUPS:
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


def check_sites(sites: Sequence[Site], plan: Plan) -> None:
    """Raise unless every site can hold the pattern and has finite weights."""
    for site in sites:
        weight = site.weight()
        if weight.is_meta:
            raise ZeroskipError(f"{site.name}: its weight is not loaded (meta device)")
        plan.pattern.check(site.shape, site.name)
        if not bool(torch.isfinite(weight).all()):
            raise ZeroskipError(f"{site.name}: its weight holds NaN or Inf")

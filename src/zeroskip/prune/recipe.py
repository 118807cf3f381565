"""What a user asks for, read and checked before anything moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zeroskip.errors import ZeroskipError, suggest
from zeroskip.model import site_patterns
from zeroskip.prune.settings import Settings

__all__ = ["DEFAULTS", "Recipe"]

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
class Recipe:
    """What a user asks for.

    Attributes
    ----------
    values : dict
        The JSON values that reproduce it.
    settings : Settings
        What is done to a site.
    """

    values: dict[str, Any]
    settings: Settings

    @staticmethod
    def read(given: dict[str, Any], recipe: Mapping[str, Any] | None = None) -> Recipe:
        """Merge the arguments of `prune` with its `recipe=`, which may not contradict them."""
        values = dict(given)
        if recipe is not None:
            if not isinstance(recipe, Mapping):
                raise ZeroskipError(f"recipe is a {type(recipe).__name__}: give a dict")
            for key, value in recipe.items():
                if key not in DEFAULTS:
                    raise ZeroskipError(f"recipe has an unknown entry {key!r}" + suggest(str(key), DEFAULTS))
                if given[key] not in (DEFAULTS[key], value):
                    raise ZeroskipError(f"{key} is {given[key]!r}, and {value!r} in the recipe: leave one out")
                values[key] = value
        for key in ("include", "exclude"):
            values[key] = None if values[key] is None else list(site_patterns(key, values[key]))
        if not isinstance(values["seed"], int):
            raise ZeroskipError(f"seed is {values['seed']!r}: give an integer")
        settings = Settings.read(values)
        return Recipe(values | settings.to_dict(), settings)

    @property
    def needs_data(self) -> bool:
        """Whether it cannot run without calibration."""
        return self.settings.composition.needs_data

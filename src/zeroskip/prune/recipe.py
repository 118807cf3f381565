"""What a user asks for: settings for all layers, rules for some of them; read and checked before anything moves.

Every rule that fits a layer changes what it names, in order, so the last rule that names a thing has the last word.
What a method cannot take (a sparsity for `gptq`, integers for `wanda`) is an error in the rule that names both, and is
dropped where it was only inherited from before the rule that named the method.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zeroskip.errors import ZeroskipError
from zeroskip.model import site_patterns
from zeroskip.prune.base import Method
from zeroskip.prune.budgets import Budget, Target
from zeroskip.prune.composition import Composition
from zeroskip.prune.obs import Obs
from zeroskip.prune.patterns import Pattern
from zeroskip.prune.recipe_file import load_recipe
from zeroskip.prune.rule import SETTINGS, Rule, check_entries, flag, tables_rule
from zeroskip.prune.settings import Settings

__all__ = ["DEFAULTS", "Recipe", "default_method"]

DEFAULTS: dict[str, Any] = {
    "method": None,
    "sparsity": None,
    "pattern": "unstructured",
    "include": None,
    "exclude": ("lm_head",),
    "seed": 0,
    "values": None,
    "group_size": None,
    "rotate": False,
    "permute": False,
    "budget": None,
    "target": None,
    "embeddings": None,
}
YIELDING = ("group_size", "embeddings")  # what an argument may replace in a recipe
ENTRIES = ("about", *DEFAULTS, "dense", "rules", "allocation")


def default_method(pattern: Pattern) -> str:
    """Return the method where none is named: the best perplexity for its time that was measured (docs/pruning.md)."""
    return "obs" if pattern.rows > 1 and Obs().serves(pattern) else "admm+ls"


@dataclass(frozen=True)
class Decision:
    """What is done to a layer: None where it stays dense; the indices of the rules that had a say, -1 for none; and
    whether the budget decides on its zeros."""

    settings: Settings | None
    rules: set[int]
    free: bool


@dataclass(frozen=True)
class _Share:
    """Budget and target, as they were given."""

    budget: Budget | None
    target: Target | None
    entries: dict[str, Any]

    @staticmethod
    def read(values: Mapping[str, Any]) -> _Share:
        budget, target, sparsity = values["budget"], values["target"], values["sparsity"]
        if budget is None and target is None:
            return _Share(None, None, {})
        entries = {"budget": "uniform" if budget is None else budget, "target": target, "sparsity": sparsity}
        read = Budget.read(entries["budget"])
        if target is not None and sparsity is not None:
            raise ZeroskipError(f"sparsity is {sparsity!r}, and the target {target!r}: leave one out")
        if target is None:
            if sparsity is None:
                sparsity = Pattern.parse(values["pattern"]).sparsity
            if sparsity is None:
                raise ZeroskipError(
                    f"budget {read.name!r} needs a target: give a sparsity, or target={{ms: 12, tokens: 32}}"
                )
            return _Share(read, Target.read({"sparsity": sparsity}), entries)
        return _Share(read, Target.read(target), entries)

    def placeholder(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What stands for the sparsity while the settings of all layers are checked."""
        free = self.budget is not None and values["sparsity"] is None
        pattern = Pattern.parse(values["pattern"])
        chooses = Composition.parse(values["method"]).method.chooses
        if self.budget is not None and not chooses:
            raise ZeroskipError(
                f"method {values['method']!r} keeps the zeros that are there: leave budget and target out"
            )
        return {"sparsity": 0.0} if free and pattern.sparsity is None else {}


@dataclass(frozen=True)
class Recipe:
    """What a user asks for.

    Attributes
    ----------
    values : dict
        The JSON values that reproduce it.
    rules : tuple of Rule
    budget : Budget or None
        Shares out the zeros of layers that no rule gives a sparsity.
    target : Target or None
        What it has to reach; given if and only if there is a budget.
    """

    values: dict[str, Any]
    rules: tuple[Rule, ...] = ()
    budget: Budget | None = None
    target: Target | None = None

    @staticmethod
    def read(given: Mapping[str, Any], recipe: Mapping[str, Any] | str | os.PathLike[str] | None = None) -> Recipe:
        """Merge the arguments of `prune` with its `recipe=`, which may not contradict them.

        Parameters
        ----------
        given : mapping
            A value for each key of `DEFAULTS`; one that equals the default counts as not given.
        recipe : mapping, name or path, optional
            See docs/pruning.md.

        Raises
        ------
        ZeroskipError
            One line, on anything that is unknown, of the wrong type or contradictory.
        """
        stored = isinstance(recipe, str | os.PathLike)
        asked: Any = load_recipe(recipe) if isinstance(recipe, str | os.PathLike) else recipe
        asked = {} if recipe is None else asked
        if not isinstance(asked, Mapping):
            where = f"recipe {recipe}" if stored else "recipe"
            seen = "is empty" if asked is None else f"is a {type(asked).__name__}"
            raise ZeroskipError(f"{where} {seen}: give a map of entries" + ("" if stored else ", a file or a name"))
        check_entries(asked, ENTRIES, "recipe")
        values = dict(given)
        for key in DEFAULTS:
            if asked.get(key) is None and key not in ("include", "exclude"):
                continue
            if key in asked and not (key in YIELDING and given[key] != DEFAULTS[key]):
                if given[key] not in (DEFAULTS[key], asked[key]):
                    raise ZeroskipError(f"{key} is {given[key]!r}, and {asked[key]!r} in the recipe: leave one out")
                values[key] = asked[key]
        for key in ("include", "exclude"):
            values[key] = None if values[key] is None else list(site_patterns(key, values[key]))
        if isinstance(values["seed"], bool) or not isinstance(values["seed"], int):
            raise ZeroskipError(f"seed is {values['seed']!r}: give an integer")
        flag(values, "rotate", "the recipe")
        flag(values, "permute", "the recipe")
        if not isinstance(asked.get("about"), str | None):
            raise ZeroskipError(f"about is {asked['about']!r}: give a sentence")
        rules = asked.get("rules")
        if not isinstance(rules, list | tuple | None):
            raise ZeroskipError(f"rules is a {type(rules).__name__}: give a list of maps")
        tables = tables_rule(values["embeddings"])
        if values["method"] is None:
            values["method"] = default_method(Pattern.parse(values["pattern"]))
        share = _Share.read(values)
        if flag(asked, "dense", "recipe"):
            for key in (*SETTINGS, "budget", "target", "embeddings"):
                if asked.get(key) is not None or given[key] != DEFAULTS[key]:
                    raise ZeroskipError(f"the recipe leaves all layers dense: leave {key} out")
                del values[key]
            values["dense"] = True
        else:
            values |= Settings.read(values | share.placeholder(values)).to_dict() | share.entries
        for key in ("budget", "target", "embeddings"):
            if values.get(key) is None:
                values.pop(key, None)
        if "allocation" in asked:
            if "budget" not in values:
                raise ZeroskipError("allocation is what a budget made of a model: give the budget too")
            values["allocation"] = asked["allocation"]
        if rules:
            values["rules"] = [dict(rule) if isinstance(rule, Mapping) else rule for rule in rules]
        read = [Rule.read(rule, f"rule {i}") for i, rule in enumerate(rules or (), 1)]
        found = Recipe(values, tuple(tables + read), share.budget, share.target)
        for key in ("rotate", "permute"):
            if values[key] and not any(method.needs_data for method in found.methods):
                raise ZeroskipError(f"{key} needs a method that uses calibration data, such as wanda+ls: leave one out")
        return found

    @property
    def methods(self) -> list[Composition]:
        """Every method that is named."""
        names = [] if self.values.get("dense") else [self.values["method"]]
        names += [rule.changes["method"] for rule in self.rules if "method" in rule.changes]
        return [Composition.parse(name) for name in dict.fromkeys(names)]

    @property
    def needs_data(self) -> bool:
        """Whether it cannot run without calibration."""
        curious = "allocation" not in self.values and any(self.budget_needs(each.method) for each in self.methods)
        return curious or any(each.needs_data for each in self.methods)

    def budget_needs(self, method: Method) -> bool:
        """Whether the budget cannot do without calibration for layers of this method."""
        return self.budget is not None and method.chooses and bool(self.budget.needs(method))

    def settings(self, name: str) -> Decision:
        """Return what is done to a layer."""
        values, source = DEFAULTS | self.values, dict.fromkeys(SETTINGS, -1)
        dense_by = -1
        for index, rule in enumerate(self.rules):
            if rule.fits(name):
                values |= {"dense": False} | rule.changes
                source |= dict.fromkeys(rule.changes, index)
                dense_by = index
        if values.get("dense"):
            return Decision(None, {dense_by}, False)
        awake = source.pop("dense", -1)  # a rule that says dense: false
        if awake >= 0 and not self.rules[awake].changes["dense"]:
            source["dense"] = awake
        try:
            if values["method"] is None:  # of a recipe that leaves all layers dense but those of its rules
                values["method"] = default_method(Pattern.parse(values["pattern"]))
            _drop_inherited(values, source)
            free = self.budget is not None and source.get("sparsity", -1) < 0
            pattern = Pattern.parse(values["pattern"])
            free = free and Composition.parse(values["method"]).method.chooses
            free = free and (pattern.sparsity is None or source.get("pattern", -1) < 0)
            if free and pattern.sparsity is None:
                values["sparsity"] = 0.0
            settings = Settings.read(values)
        except ZeroskipError as error:
            blamed = " and ".join(self.rules[i].where for i in sorted({*source.values()} - {-1}))
            raise ZeroskipError(f"{blamed}: {error} (for {name})" if blamed else str(error)) from None
        return Decision(settings, set(source.values()), free)


def _drop_inherited(values: dict[str, Any], source: dict[str, int]) -> None:
    """Forget what comes from before the rule that named the method, or the pattern, and does not go with it."""
    method, pattern = Composition.parse(values["method"]).method, Pattern.parse(values["pattern"])
    gone = [] if method.chooses else ["sparsity"]
    gone += [] if method.quantizes else ["values", "group_size"]
    for key in gone:
        if source[key] < source["method"]:
            values[key] = None
            del source[key]
    if not method.serves(pattern) and source["pattern"] < source["method"]:
        values["pattern"] = "unstructured"
        del source["pattern"]
    elif pattern.sparsity is not None and source.get("sparsity", source["pattern"]) < source["pattern"]:
        values["sparsity"] = None
        del source["sparsity"]

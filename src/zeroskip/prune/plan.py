"""A recipe applied to a model: which sites, and what is done to each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from zeroskip.calibrate import Batch, Block, find_blocks, sites_of
from zeroskip.computed import computed_layers
from zeroskip.errors import ZeroskipError, suggest
from zeroskip.model import BARRED, Site, every_site, fits, select_sites, tied
from zeroskip.planning.install import compiled_layers
from zeroskip.prune.base import BlockSolver, Loss, Method, Survey
from zeroskip.prune.recipe import Recipe
from zeroskip.prune.settings import Settings

__all__ = ["Plan"]

OUTSIDE = "outside the blocks; name it in include= to prune it"
COMPILED = "compiled already; prune a model first, then compile it"


@dataclass(frozen=True)
class Plan:
    """A recipe applied to a model.

    Attributes
    ----------
    recipe : dict
        The JSON values that reproduce the run.
    seed : int
    blocks : list of Block
        In module order.
    sites : list of Site
        In module order; all lie in a block.
    settings : dict
        {name of a site: Settings}.
    skipped : dict
        {name of a site that stays dense: reason}.
    free : list of str
        Names of the sites whose sparsity a budget is still to decide on.
    """

    recipe: dict[str, Any]
    seed: int
    blocks: list[Block]
    sites: list[Site]
    settings: dict[str, Settings]
    skipped: dict[str, str]
    free: list[str] = field(default_factory=list)

    @staticmethod
    def of(recipe: Recipe, model: nn.Module) -> Plan:
        """Choose the sites and check that each can hold what is asked of it.

        Raises
        ------
        ZeroskipError
            Where nothing is left to prune, or a site does not fit its pattern.
        """
        blocks, sites, skipped = _chosen(recipe, model)
        settings: dict[str, Settings] = {}
        effective: set[int] = set()
        free: list[str] = []
        known: dict[Any, Settings] = {}
        for site in sites:
            decision = recipe.settings(site.name)
            found, rules = decision.settings, decision.rules
            effective |= rules
            if decision.free and found is not None:
                free.append(site.name)
            if found is None:
                by = max(rules)
                skipped[site.name] = "left dense by " + (recipe.rules[by].where if by >= 0 else "the recipe")
            else:
                settings[site.name] = known.setdefault(json.dumps(found.to_dict()), found)  # one object where alike
        for index, rule in enumerate(recipe.rules):
            theirs = [site.name for site in sites if rule.fits(site.name)]
            if theirs and index not in effective:
                raise ZeroskipError(
                    f"{rule.where} has no effect: later rules change all it says for every layer it fits, "
                    f"such as {theirs[0]}; leave it out or put it behind them"
                )
        if not settings and not recipe.values.get("dense"):
            raise ZeroskipError("the model has nothing to prune: the rules leave every layer dense")
        sites = _untwinned([site for site in sites if site.name in settings], tied(model), settings, skipped)
        free = [site.name for site in sites if site.name in free]
        for site in sites:
            settings[site.name].check(site)
        for name in free:
            if not settings[name].pattern.shared:
                raise ZeroskipError(
                    f"{name}: a budget cannot change {settings[name].pattern.name}: name the pattern in a rule, which "
                    "keeps it, or leave the budget out"
                )
        if recipe.budget is not None and not free:
            raise ZeroskipError(
                f"budget {recipe.budget.name!r} has no layer: the rules give each a sparsity of its own"
            )
        plan = Plan(recipe.values, recipe.values["seed"], blocks, sites, settings, skipped, free)
        if recipe.values["permute"] and plan.surveys:
            raise ZeroskipError(f"permute: {plan.names} looks at the whole model before channels move: leave one out")
        if recipe.values["permute"] and not any(each.pattern.permutes for each in settings.values()):
            raise ZeroskipError(
                "permute serves N:M, strips and blocks; without such a pattern it gains nothing: leave it out"
            )
        return plan

    @property
    def needs_data(self) -> bool:
        """Whether it cannot run without calibration."""
        return any(settings.composition.needs_data for settings in self.settings.values())

    @property
    def needs_head(self) -> bool:
        """Whether a site outside the lists of blocks, such as a head, must see every token."""
        alone = [block for block in self.blocks if block.name == block.group]
        return any(
            block.name == ""
            or any(self.settings[site.name].composition.needs_data for site in sites_of(block, self.sites))
            for block in alone
        )

    @property
    def names(self) -> str:
        """The methods in it, quoted, for messages."""
        return ", ".join(dict.fromkeys(repr(settings.composition.name) for settings in self.settings.values()))

    @property
    def surveys(self) -> bool:
        """Whether a method looks at the whole model first."""
        return any(settings.composition.method.surveys for settings in self.settings.values())

    @property
    def whole(self) -> bool:
        """Whether a solver works on the whole model once all blocks are pruned."""
        return any(settings.composition.whole for settings in self.settings.values())

    def block_solvers(self, sites: Sequence[Site], whole: bool = False) -> list[tuple[BlockSolver, list[Site]]]:
        """Return what works on blocks, or on the whole model, each with those of the sites that asked for it, in their
        order."""
        found: dict[str, tuple[BlockSolver, list[Site]]] = {}
        for site in sites:
            for solver in self.settings[site.name].composition.block_solvers:
                if solver.whole == whole:
                    found.setdefault(solver.name, (solver, []))[1].append(site)
        return list(found.values())

    def survey(self, model: nn.Module, batches: list[Batch], loss: Loss | None) -> dict[str, dict[str, Tensor]]:
        """Let each method that asks for it look at the whole model; return {site: {statistic: [groups, ...]}}."""
        asking: dict[str, tuple[Method, list[Site]]] = {}
        for site in self.sites:
            method = self.settings[site.name].composition.method
            if method.surveys:
                asking.setdefault(method.name, (method, []))[1].append(site)
        patterns = {name: settings.pattern for name, settings in self.settings.items()}
        sparsity = {name: settings.sparsity for name, settings in self.settings.items()}
        found: dict[str, dict[str, Tensor]] = {}
        for method, sites in asking.values():
            found |= method.survey(Survey(model, sites, batches, loss, patterns, sparsity, self.seed))
        return found


def _untwinned(
    sites: list[Site], twins: dict[int, tuple[int, ...]], settings: dict[str, Settings], skipped: dict[str, str]
) -> list[Site]:
    """Of sites that share their weight, keep the last (a head rather than an embedding), which stands for all."""
    weights = [twins.get(id(site.tensor), (id(site.tensor),)) for site in sites]
    last = dict(zip(weights, sites, strict=True))
    for site, weight in zip(sites, weights, strict=True):
        twin = last[weight]
        if twin is site:
            continue
        if settings[site.name] != settings[twin.name]:
            raise ZeroskipError(f"{site.name} and {twin.name} share one weight: the recipe must ask the same of both")
        del settings[site.name]
        skipped[site.name] = f"shares its weight with {twin.name}, which is pruned"
    return [site for site in sites if site.name in settings]


def _chosen(recipe: Recipe, model: nn.Module) -> tuple[list[Block], list[Site], dict[str, str]]:
    """Return the blocks, the sites in them that are to be looked at, and why others are not."""
    include, exclude = recipe.values["include"], recipe.values["exclude"]
    sites, skipped = select_sites(model, include, exclude)
    names = [*(site.name for site in sites), *skipped]
    for rule in recipe.rules:
        if not rule.optional and not any(rule.fits(name) for name in names):
            near = suggest(rule.include[0], names) if rule.include else ""
            raise ZeroskipError(f"{rule.where} names no layer: {', '.join(rule.include) or 'all are excluded'}{near}")
    named = [
        name for name in names for rule in recipe.rules if rule.fits(name) and any(fits(p, name) for p in rule.named)
    ]
    extra = select_sites(model, named, None)[0] if named else []
    sites += [site for site in extra if site.name in skipped]
    blocks = find_blocks(model, sites if include else extra)
    inside = {site.name for block in blocks for site in sites_of(block, sites)}
    for site in sites:
        skipped.pop(site.name, None)
        if site.name not in inside:
            skipped[site.name] = OUTSIDE
    for rule in recipe.rules:
        left = [name for name in names if rule.fits(name)]
        if left and not rule.optional and not rule.changes.get("dense") and not inside & set(left):
            raise ZeroskipError(f"{rule.where} names only layers that are left out: {left[0]} ({skipped[left[0]]})")
    every = every_site(model)
    order = {site.name: index for index, site in enumerate(every)}
    sites = sorted((site for site in sites if site.name in inside), key=lambda site: order[site.name])
    for site in every:  # most models have embeddings, and nobody expects them to be pruned
        if isinstance(site.module, nn.Embedding) and site.name in skipped and site.name not in named:
            del skipped[site.name]
    known = {site.owner for site in every}
    compiled = {name: COMPILED for name, _ in compiled_layers(model) if name not in known}
    if not include:
        _refuse_compiled(model, compiled, every)
    skipped = compiled | computed_layers(model) | skipped
    barred = [name for name, reason in skipped.items() if include and reason.startswith(BARRED)]
    if not sites and barred:
        raise ZeroskipError(
            f"the model has nothing to prune: include names only what exclude leaves out, such as {barred[0]} "
            f"({skipped[barred[0]]}{', the default' if exclude == ['lm_head'] else ''}); give another, '' for none"
        )
    if not sites:
        raise ZeroskipError(
            "the model has nothing to prune: no weight is left that can be"
            + (f" ({len(skipped)} skipped, e.g. {next(iter(skipped.items()))})" if skipped else "")
        )
    return blocks, sites, skipped


def _refuse_compiled(model: nn.Module, compiled: Iterable[str], sites: Iterable[Site]) -> None:
    """Raise where all that is left of the blocks is packed."""
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    if any(name.startswith(blocks) for name in compiled) and not any(site.name.startswith(blocks) for site in sites):
        raise ZeroskipError("the model is compiled already; prune the model it was made from")

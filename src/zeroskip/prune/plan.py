"""A recipe applied to a model: which sites, and what is done to each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zeroskip.calibrate import Batch, Block, find_blocks, sites_of
from zeroskip.errors import ZeroskipError
from zeroskip.model import Site, select_sites
from zeroskip.prune.base import BlockSolver, Loss, Method, Survey
from zeroskip.prune.recipe import Recipe
from zeroskip.prune.settings import Settings

__all__ = ["Plan"]

OUTSIDE = "outside the blocks; name it in include= to prune it"


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
    """

    recipe: dict[str, Any]
    seed: int
    blocks: list[Block]
    sites: list[Site]
    settings: dict[str, Settings]
    skipped: dict[str, str]

    @staticmethod
    def of(recipe: Recipe, model: nn.Module) -> Plan:
        """Choose the sites and check that each can hold what is asked of it.

        Raises
        ------
        ZeroskipError
            Where nothing is left to prune, or a site does not fit its pattern.
        """
        include, exclude = recipe.values["include"], recipe.values["exclude"]
        sites, skipped = select_sites(model, include, exclude)
        blocks = find_blocks(model, sites if include else ())
        inside = {site.name for block in blocks for site in sites_of(block, sites)}
        skipped |= {site.name: OUTSIDE for site in sites if site.name not in inside}
        sites = [site for site in sites if site.name in inside]
        if not sites:
            raise ZeroskipError(
                "the model has nothing to prune: no nn.Linear or Conv1D is left"
                + (f" ({len(skipped)} skipped, e.g. {next(iter(skipped.items()))})" if skipped else "")
            )
        for site in sites:
            recipe.settings.check(site)
        settings = {site.name: recipe.settings for site in sites}
        return Plan(recipe.values, recipe.values["seed"], blocks, sites, settings, skipped)

    @property
    def needs_data(self) -> bool:
        """Whether it cannot run without calibration."""
        return any(settings.composition.needs_data for settings in self.settings.values())

    @property
    def names(self) -> str:
        """The methods in it, quoted, for messages."""
        return ", ".join(dict.fromkeys(repr(settings.composition.name) for settings in self.settings.values()))

    @property
    def surveys(self) -> bool:
        """Whether a method looks at the whole model first."""
        return any(settings.composition.method.surveys for settings in self.settings.values())

    def block_solvers(self, sites: Sequence[Site]) -> list[tuple[BlockSolver, list[Site]]]:
        """Return what works on whole blocks, each with those of the sites that asked for it, in their order."""
        found: dict[str, tuple[BlockSolver, list[Site]]] = {}
        for site in sites:
            for solver in self.settings[site.name].composition.block_solvers:
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

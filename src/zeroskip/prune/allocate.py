"""A plan whose zeros are shared out by a budget."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from zeroskip.calibrate import Batch, Collector, collect, sites_of
from zeroskip.errors import ZeroskipError, suggest
from zeroskip.prune.budgets import Budget, Item, Target, solve
from zeroskip.prune.budgets.costs import Cost
from zeroskip.prune.budgets.solve import Outcome
from zeroskip.prune.patterns import Pattern
from zeroskip.prune.plan import Plan
from zeroskip.prune.settings import Settings
from zeroskip.prune.walk import replay_of

__all__ = ["allocate", "allocated"]

log = logging.getLogger(__name__)

ROUNDS = 6  # of deciding, at most, where the answer shows what is still to be measured
SAME = 0.01  # how far what was measured may be from what was decided by

Allocation = dict[str, float | str]
"""{layer: its share of zeros, or its N:M pattern; "dense"}"""


def allocate(
    model: nn.Module, plan: Plan, budget: Budget, target: Target, batches: list[Batch], found: Mapping[str, Any]
) -> tuple[Allocation, dict[str, Any]]:
    """Return how the budget shares out the zeros among `plan.free`, and the account of it for the report.

    Parameters
    ----------
    model : nn.Module
        In eval mode, dense; not modified.
    batches : list of Batch
        Empty where nothing needs data.
    found : mapping
        What surveys found.
    """
    stats = _statistics(model, plan, budget, batches)
    uses = _uses(model, plan, batches) if target.unit == "flops" and batches else {}
    order = _order(plan)
    items = {
        site.name: Item(
            site,
            plan.settings[site.name],
            *order[site.name],
            uses.get(site.name, 1.0),
            {**stats.get(site.name, {}), **found.get(site.name, {})},
        )
        for site in plan.sites
    }
    cost = target.cost()
    cost.prepare(list(items.values()))
    free = [items[name] for name in plan.free]
    fixed = [item for name, item in items.items() if name not in plan.free]
    unseen = [item for item in free if budget.needs(item.settings.composition.method) and not item.stats]
    if unseen:
        log.warning("%d layers, such as %s, saw no token and get no zeros", len(unseen), unseen[0].site.name)
    made: Allocation = {item.site.name: "dense" for item in unseen}
    free = [item for item in free if item not in unseen]
    outcome = _decided(budget, target, cost, free, fixed)
    for item, count in zip(free, outcome.zeros, strict=True):
        pattern = item.settings.pattern
        of = pattern.steps
        if of is None:
            made[item.site.name] = count / item.numel
            continue
        kept = of - round(count * of / item.numel)
        made[item.site.name] = "dense" if kept == of else pattern.with_kept(kept).name
    account: dict[str, Any] = {"name": budget.name, "unit": "params" if target.unit == "sparsity" else target.unit}
    account |= {"dense": outcome.dense, "asked": outcome.asked, "reached": outcome.reached}
    log.info("%s %s", account, made)
    return {name: made[name] for name in plan.free}, account


def _decided(budget: Budget, target: Target, cost: Cost, free: Sequence[Item], fixed: Sequence[Item]) -> Outcome:
    """Return the outcome that meets the target best, where the answer may show what is still to be measured."""
    found: list[Outcome] = []
    for _ in range(ROUNDS):
        outcome = solve(budget, target, cost, free, fixed)
        more = cost.checked(free, [count / item.numel for count, item in zip(outcome.zeros, free, strict=True)])
        found.append(replace(outcome, reached=outcome.reached + more))
        if abs(more) <= SAME * outcome.reached:
            break
    return min(found, key=lambda each: abs(each.reached - each.asked))


def allocated(plan: Plan, allocation: Any) -> Plan:
    """Return the plan with these shares of zeros.

    Raises
    ------
    ZeroskipError
        If the allocation is not one for the layers of this plan.
    """
    if not isinstance(allocation, Mapping):
        raise ZeroskipError(f"allocation is a {type(allocation).__name__}: give a map from layers to sparsities")
    for name in allocation:
        if name not in plan.free:
            raise ZeroskipError(
                f"allocation names {name!r}, to which no budget applies" + suggest(str(name), plan.free)
            )
    for name in plan.free:
        if name not in allocation:
            raise ZeroskipError(f"allocation leaves out {name}: leave it out whole, and the budget makes a new one")
    settings, skipped = dict(plan.settings), dict(plan.skipped)
    for name, share in allocation.items():
        if share == "dense":
            del settings[name]
            skipped[name] = "left dense by the budget"
        else:
            settings[name] = _with(settings[name], share, name)
    sites = [site for site in plan.sites if site.name in settings]
    for site in sites:
        settings[site.name].pattern.check(site.shape, site.name)
    recipe = plan.recipe | {"allocation": dict(allocation)}
    return replace(plan, recipe=recipe, settings=settings, sites=sites, skipped=skipped)


def _with(settings: Settings, share: Any, name: str) -> Settings:
    if isinstance(share, str):
        pattern = Pattern.parse(share)
        old = settings.pattern
        if old.steps is None or old.steps != pattern.steps or pattern.with_kept(1) != old.with_kept(1):
            raise ZeroskipError(f"allocation: {name} has {share!r}, which is not {old.name} with another N")
        return replace(settings, pattern=pattern, sparsity=pattern.sparsity or 0.0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise ZeroskipError(f"allocation: {name} has {share!r}: give a fraction of zeros in [0, 1)")
    if settings.pattern.steps is not None:
        raise ZeroskipError(f"allocation: {name} has {share!r}: give an N:M pattern such as {settings.pattern.name!r}")
    return replace(settings, sparsity=float(share))


def _order(plan: Plan) -> dict[str, tuple[str, float]]:
    """{layer: (its block, or its own name in a model of one block; its place from 0 to 1)}"""
    block_of = {site.name: block.name for block in plan.blocks for site in sites_of(block, plan.sites)}
    if len(set(block_of.values())) == 1:
        block_of = {name: name for name in block_of}
    blocks = list(dict.fromkeys(block_of[site.name] for site in plan.sites))
    place = {name: index / max(1, len(blocks) - 1) for index, name in enumerate(blocks)}
    return {name: (block, place[block]) for name, block in block_of.items()}


def _statistics(model: nn.Module, plan: Plan, budget: Budget, batches: list[Batch]) -> dict[str, dict[str, Tensor]]:
    """What the budget needs of the dense model."""
    sites = [site for site in plan.sites if site.name in plan.free]
    needs = {site.name: budget.needs(plan.settings[site.name].composition.method) for site in sites}
    if not any(needs.values()):
        return {}
    replay = replay_of(model, plan.blocks, sites, batches, plan.seed)
    found: dict[str, dict[str, Tensor]] = {}
    for block in replay.order:
        inside = sites_of(block, sites)
        if inside:
            found |= {name: stats for name, (_, stats) in collect(replay, block, inside, needs).items()}
        replay.advance(block)
    return found


def _uses(model: nn.Module, plan: Plan, batches: Sequence[Batch]) -> dict[str, float]:
    """How many tokens each layer sees for one row of the first batch."""
    collector = Collector(plan.sites, (), lambda x: None)
    try:
        batches[0].call(model)
        tokens = {site.name: collector.result(site)[0] for site in plan.sites}
    finally:
        collector.close()
    first = next((value for value in batches[0].named.values() if isinstance(value, Tensor) and value.dim()), None)
    return {name: count / (1 if first is None else len(first)) for name, count in tokens.items()}

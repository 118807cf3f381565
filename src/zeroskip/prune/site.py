"""One site: its settings on each of its matrices, the weight written, a row of the report."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from zeroskip.calibrate import Stat
from zeroskip.model import Site
from zeroskip.prune.base import Problem
from zeroskip.prune.report import Row
from zeroskip.prune.settings import Settings

__all__ = ["SHORT", "of_group", "prune_site"]

SHORT = "calibrated on only"


@torch.no_grad()
def prune_site(site: Site, settings: Settings, stats: Mapping[str, Tensor], tokens: int, draw: torch.Generator) -> Row:
    """Prune one site in place; return its row of the report."""
    started = time.perf_counter()
    old = site.weight().float()
    chosen = settings.composition.method.chooses
    asked = settings.sparsity if chosen else float((old == 0).double().mean())
    new = torch.empty_like(old)
    notes: list[str] = []
    scales: list[Tensor] = []
    before = after = total = 0.0
    shares = settings.pattern.shares(settings.sparsity, len(old), site.shape)
    blind: list[str] = []
    least = tokens
    for group, weight in enumerate(old):
        part, seen = of_group(stats, group, tokens)
        if tokens and not seen:
            blind.append(str(group))
        least = min(least, seen or least)
        problem = Problem(site.name, weight, settings.pattern, shares[group], part, draw, seen, settings.integers)
        first, last = settings.composition.run(problem)
        new[group] = last.weight.masked_fill(~last.keep, 0.0)
        notes += last.notes
        if last.scales is not None:
            scales.append(last.scales)
        if "gram" in part and seen:
            total += _energy(weight, part["gram"])
            before += _energy(weight - first.weight, part["gram"])
            after += _energy(weight - new[group], part["gram"])
    if blind:
        which = ", ".join(blind)
        notes.append(f"no calibration token reached matrices {which} of {len(old)}: their zeros are chosen by size")
    wanted = settings.composition.tokens_wanted(site.shape[2])
    if 0 < least < wanted:
        name, inputs = settings.composition.name, site.shape[2]
        notes.append(f"{SHORT} {least} tokens; {name!r} wants {wanted} at least for {inputs} inputs: give more data")
    site.write(new)
    site.keep_scales(torch.stack(scales) if scales else None)
    written = site.weight()
    return Row(
        name=site.name,
        shape=list(site.shape),
        pattern=settings.pattern.name,
        sparsity_asked=asked,
        sparsity=float((written == 0).double().mean()),
        error_before=before / total if total else None,
        error=after / total if total else None,
        tokens=tokens,
        seconds=time.perf_counter() - started,
        notes=list(dict.fromkeys(notes)),
    )


def of_group(stats: Mapping[str, Tensor], group: int, tokens: int) -> tuple[dict[str, Tensor], int]:
    """Return the statistics of one matrix and how many tokens they saw; a single row stands for all groups."""
    part = {name: value[group if len(value) > 1 else 0] for name, value in stats.items()}
    seen = part.pop("tokens", None)
    if seen is None or int(seen):
        return part, tokens if seen is None else int(seen)
    return {name: Stat.known[name].blind(value) if name in Stat.known else value for name, value in part.items()}, 0


def _energy(weight: Tensor, gram: Tensor) -> float:
    """||W X||^2 from G = X^T X."""
    return float(((weight @ gram) * weight).sum(dtype=torch.float64))

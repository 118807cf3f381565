"""Which sites can be planned, and the plan of one site: measure what can run it, choose, write down why."""

from __future__ import annotations

import copy
import logging
import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.computed import computed_layers
from zeroskip.errors import ZeroskipError
from zeroskip.formats import get
from zeroskip.model import Site, every_site, select_sites
from zeroskip.planning.candidates import NAMES, allowed_values
from zeroskip.planning.choose import Choice, choose
from zeroskip.planning.install import weights_of
from zeroskip.planning.measure import Measured, measure, measure_layouts
from zeroskip.planning.plan import SitePlan
from zeroskip.planning.products import product_of
from zeroskip.planning.rows import steady_layouts
from zeroskip.planning.shaped import Example, conv_layouts, is_shaped, key_of, probe_of, shaped_obstacle, stand_in
from zeroskip.planning.tokens import Tokens
from zeroskip.planning.zeros import Zeros, find_zeros
from zeroskip.quantize import kinds_of
from zeroskip.sites import LinearAdapter
from zeroskip.split_layers import Stack, split_of

__all__ = ["Planner", "check_weights", "left_to_torch", "plannable", "recorded_kinds", "site_plan"]

log = logging.getLogger(__name__)

BUSY = 0.25  # spread of one layer's times; on a quiet machine it is a few per cent
NEAR = 0.02  # weights whose non-zeros differ by less are measured once


class Planner:
    """Measures sites and chooses for them; sites that share a key are measured once.

    The key is shape, dtype, pattern, non-zeros within 2 %, whether there is a bias, the shape of given scales, and
    the integers that a solver has rounded to. The number of threads is the process's. With `batch_invariant` only
    kernels that give a row the same bits in every batch are chosen; all are measured, so that the plan can say what
    that costs.
    """

    def __init__(
        self,
        tokens: Tokens,
        precision: str | None,
        working_set_bytes: int,
        budget_s: float,
        batch_invariant: bool = False,
        prefer: str = "speed",
    ) -> None:
        self.tokens, self.precision, self.batch_invariant, self.prefer = tokens, precision, batch_invariant, prefer
        self.working_set_bytes, self.budget_s = working_set_bytes, budget_s
        self.spreads: list[float] = []
        self._known: dict[tuple[Any, ...], list[tuple[int, SitePlan]]] = {}

    def plan(self, site: Site, notes: list[str], example: Example | None = None) -> SitePlan:
        """Return the plan of one site, measured here or at an earlier site of the same key.

        A shaped site (a convolution, a product of a layer taken apart) is measured at the size of its example.
        """
        weight, bias = weights_of(site)
        if isinstance(product_of(site), Stack):  # one of its products stands for all
            bias = stand_in(site).bias
        zeros = find_zeros(weight if site.shape[0] == 1 else site.weight().flatten(0, 1))
        scales = None if site.scales is None else site.scales.shape
        recorded = recorded_kinds(site, weight)
        key: tuple[Any, ...] = (*weight.shape, weight.dtype, zeros.pattern, bias is not None, scales, recorded)
        key += () if example is None else key_of(site, example)
        for nnz, known in self._known.setdefault(key, []):
            # Zeros that are alike in number may still not all fit a format that needs a pattern.
            fits = not known.is_packed or get(known.format).accepts(weight) is None
            if fits and abs(nnz - zeros.nnz) <= NEAR * max(nnz, 1):
                return replace(copy.deepcopy(known), name=site.name, sparsity=zeros.sparsity)
        log.info("measuring %s (%dx%d, %s)", site.name, *weight.shape, zeros.pattern)
        values = allowed_values(weight.dtype, self.precision, recorded)
        measured = self.measure(site, weight, bias, values, example)
        self.spreads += [race.spread(race.names[0]) for race in measured.races.values() if race.names]
        counts = self.tokens if example is None else Tokens(example.counts)
        steady = steady_layouts(measured, weight.dtype) if self.batch_invariant else None
        made = site_plan(site.name, weight, zeros, measured, choose(measured, counts, steady, self.prefer))
        if isinstance(product_of(site), Stack):
            made = _as_often(made, site.shape[0])
        notes += [f"{name} {problem}; not used (found at {site.name})" for name, problem in measured.wrong.items()]
        self._known[key].append((zeros.nnz, made))
        return made

    def unrest(self) -> str | None:
        """Return a note if the machine was too busy for fine decisions, None if not."""
        spread = statistics.median(self.spreads) if self.spreads else 0.0
        if spread < BUSY:
            return None
        return (
            f"the machine was busy while measuring: the middle half of the times spans {spread:.0%} of the median; "
            "close calls went to the dense side, so compile again when it is quiet"
        )

    def measure(
        self, site: Site, weight: Tensor, bias: Tensor | None, values: tuple[str, ...], example: Example | None
    ) -> Measured:
        limits: Any = {"working_set_bytes": self.working_set_bytes, "budget_s": self.budget_s}
        if example is None:
            return measure(site.module, weight, bias, values=values, tokens=self.tokens.counts, **limits)
        if split_of(site.module) is not None:
            return measure(stand_in(site), weight, bias, values=values, tokens=example.counts, **limits)
        with torch.inference_mode(False), torch.no_grad():
            found, refused = conv_layouts(site, weight, bias, values, self.batch_invariant)
        probes = partial(probe_of, site, example)
        return measure_layouts(found, weight, bias, tokens=(example.tokens,), refused=refused, probes=probes, **limits)


def recorded_kinds(site: Site, weight: Tensor) -> tuple[str, ...]:
    """Return the integers that a solver has rounded the weight [m, k] of a site to, from wide to narrow; often none."""
    return () if site.whole_scales is None else kinds_of(weight, site.whole_scales[0])


def site_plan(name: str, weight: Tensor, zeros: Zeros, measured: Measured, choice: Choice) -> SitePlan:
    """Write down what was measured and chosen at one site."""
    layout = measured.layout(choice.label)
    times: dict[str, dict[str, dict[int, float]]] = {}
    for tokens, result in measured.races.items():
        for runner in result.names:
            label, _, kernel = runner.rpartition("/")
            times.setdefault(label, {}).setdefault(kernel, {})[tokens] = result.median(runner) * 1e3
    return SitePlan(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        dtype=NAMES[weight.dtype],
        pattern=zeros.pattern,
        sparsity=zeros.sparsity,
        format=layout.format,
        values=layout.values,
        kernels=choice.buckets,
        reason=choice.reason,
        bytes_before=measured.layouts[0].nbytes,
        bytes_after=layout.nbytes,
        times_ms=times,
        speedups=choice.ratios,
        layout_bytes={layout.label: layout.nbytes for layout in measured.layouts},
        excluded={**measured.refused, **measured.wrong},
        measured_at=name,
        pinned=choice.pinned,
        passed_over=choice.passed_over,
    )


def _as_often(plan: SitePlan, count: int) -> SitePlan:
    """The plan of one product of a stack as that of all: times are those of one, bytes those of all."""
    sizes = {label: nbytes * count for label, nbytes in plan.layout_bytes.items()}
    return replace(
        plan, bytes_before=plan.bytes_before * count, bytes_after=plan.bytes_after * count, layout_bytes=sizes
    )


def check_weights(sites: list[Site]) -> None:
    """Raise ZeroskipError if a weight is not on the CPU or holds NaN or Inf; the line names the site."""
    for site in sites:
        weight = site.weight()
        if weight.device.type != "cpu":
            raise ZeroskipError(f"{site.label}: the weight is on {weight.device}; move the model with .to('cpu') first")
        wide = weight.float() if weight.element_size() < 2 else weight  # torch cannot ask that of an fp8 tensor
        if not bool(torch.isfinite(wide).all()):
            raise ZeroskipError(f"{site.label}: the weight holds NaN or Inf; repair the model first")


def plannable(
    model: nn.Module, precision: str | None, examples: Mapping[str, Example] | None = None
) -> tuple[list[Site], list[str]]:
    """Return the sites that can be planned, and one note for each kind that cannot.

    `examples` has those of the shaped sites by name.
    """
    every, skipped = select_sites(model, exclude=())
    tables = {site.name for site in every_site(model) if isinstance(site.module, nn.Embedding)}
    notes = [
        f"{name}: stays dense, {reason.partition(';')[0]}" for name, reason in skipped.items() if name not in tables
    ]
    notes += [f"{name}: stays as it is, {reason}" for name, reason in computed_layers(model).items()]
    check_weights(every)
    known = {id(site.module) for site in every if (examples or {}).get(site.name) is not None}
    bound = _bound_to_parents(model, known)
    sites: list[Site] = []
    left: list[Site] = []
    for site in every:
        reason = _obstacle(site, bound, (examples or {}).get(site.name))
        if reason is not None:
            notes.append(f"{site.name}: stays dense, {reason}")
            continue
        recorded = recorded_kinds(site, weights_of(site)[0])
        (sites if allowed_values(site.weight().dtype, precision, recorded) else left).append(site)
    for name in sorted({NAMES.get(site.weight().dtype, str(site.weight().dtype)) for site in left}):
        cure = "; give precision='bf16' or 'fp32' to have them measured" if name == "fp16" else ""
        notes.append(f"{len(left)} sites stay dense: their {name} weights have no kernels{cure}")
    if not every:
        notes.append("the model has no linear layers to compile")
    for note in notes:
        log.info("%s", note)
    return sites, notes


def left_to_torch(model: nn.Module, planned: Iterable[Site]) -> dict[str, nn.Linear]:
    """Return the layers of torch that a batch-invariant plan has to feed row by row, by name.

    They are those that no format may take: tied weights, fp16 without a precision.

    Raises
    ------
    ZeroskipError
        If there is a layer whose rows cannot be held, planned or not: recurrent, attention that reads its weights
        itself, a convolution that is not planned, experts, a linear layer that computes in a way of its own.
    """
    taken, bound = {id(site.module) for site in planned}, _bound_to_parents(model)
    found: dict[str, nn.Linear] = {}
    for site in every_site(model):
        module = site.module
        rows = split_of(module) is not None  # they compute with many rows in ways of torch's
        if isinstance(module, nn.Embedding) or (id(module) in taken and not rows):
            continue
        hooked = module._forward_hooks or module._forward_pre_hooks
        if isinstance(module, nn.Linear) and type(module) is nn.Linear and not hooked and id(module) not in bound:
            found[site.owner] = module
            continue
        kind = type(module).__name__
        raise ZeroskipError(f"{site.name}: batch_invariant cannot hold the rows of this {kind}; compile without it")
    return found


def _bound_to_parents(model: nn.Module, known: Collection[int] = ()) -> dict[int, str]:
    """Return {id of a layer: its parent's kind} for layers whose parent computes with their weight itself.

    An nn.TransformerEncoderLayer does so only while its attention is torch's, which that may not stay whose id is in
    `known`.
    """
    owners: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    for layer in (module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)):
        kind = split_of(layer.self_attn)
        if kind is None or id(layer.self_attn) not in known or kind.obstacle(layer.self_attn) is not None:
            owners.append(layer)
    return {id(child): type(owner).__name__ for owner in owners for child in owner.children()}


def _obstacle(site: Site, bound: Mapping[int, str], example: Example | None) -> str | None:
    """Return why the site cannot be replaced by another module, None if it can."""
    module = site.module
    if is_shaped(site):
        if (reason := shaped_obstacle(site, example)) is not None:
            return reason
    elif not issubclass(site.adapter, LinearAdapter):
        return f"{type(module).__name__} is not compiled yet"
    if id(module) in bound and split_of(module) is None:
        return f"{bound[id(module)]} reads its weight directly"
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} computes in a way of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks, which another module would not call"
    return None

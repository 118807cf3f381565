"""`zs.analyze`: "I pruned, why is it not smaller or faster?", answered site by site for this machine."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from zeroskip.errors import ZeroskipError, expect_seconds
from zeroskip.model import Site, unwrapped
from zeroskip.planning.break_even import BreakEven, break_even
from zeroskip.planning.candidates import PRECISIONS, allowed_values, check_precision
from zeroskip.planning.install import compiled_layers, thaw, weights_of
from zeroskip.planning.machine import Machine, this_machine
from zeroskip.planning.plan import SitePlan, plain
from zeroskip.planning.planner import Planner, plannable, recorded_kinds
from zeroskip.planning.shaped import examples_of
from zeroskip.planning.sums import chosen_ms, dense_ms, site_bytes, standing_ms
from zeroskip.planning.tokens import Tokens
from zeroskip.quantize import LIMIT

__all__ = ["Analysis", "analyze"]

log = logging.getLogger(__name__)

PAYS = 1.02  # over all linear layers; below this nobody will notice
BY_ROUNDING = 0.25  # zeros; rounding to 4 bits leaves some, but not so many


@dataclass
class Analysis:
    """What zeros would do for this model on this machine; `str()` is a table with one sentence of advice.

    Attributes
    ----------
    machine : Machine
    tokens : Tokens
    sites : list of SitePlan
        With bytes and measured speed-ups of every layout, and what `zs.compile` would choose.
    break_even : {"MxK fp32": list of BreakEven}
    gains : {tokens: ratio}
        Time of all sites with the fastest dense layouts over their time as `zs.compile` would install them.
    advice : str
        One sentence for the whole model.
    notes : list of str
        Layers that cannot be compiled, and why.
    """

    machine: Machine
    tokens: Tokens
    sites: list[SitePlan] = field(default_factory=list)
    break_even: dict[str, list[BreakEven]] = field(default_factory=dict)
    gains: dict[int, float] = field(default_factory=dict)
    advice: str = ""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON holds."""
        return {
            "machine": self.machine.to_dict(),
            "tokens": self.tokens.to_dict(),
            "advice": self.advice,
            "gains": plain(self.gains),
            "sites": [plain(asdict(site)) for site in self.sites],
            "break_even": {name: [plain(asdict(one)) for one in found] for name, found in self.break_even.items()},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        from zeroskip.planning.report import analysis_table

        return analysis_table(self)


def analyze(
    model: nn.Module | str | os.PathLike[str],
    tokens: int | Sequence[int] | Mapping[int, float] = (1, 32, 512),
    precision: str | None = None,
    *,
    example_inputs: Any = None,
    budget_s: float = 0.4,
    progress: Callable[[int, int, str], None] | None = None,
) -> Analysis:
    """Find out whether sparsity pays in this model on this machine; the model is not modified.

    Parameters
    ----------
    model : nn.Module or path
        A model on the CPU, pruned or not, compiled or not; or a directory with one.
    tokens : sequence of int, or mapping from int to weight
        Token counts, as for `zs.compile`.
    precision : None, "fp32", "bf16", "int8" or "int4"
        As for `zs.compile`.
    example_inputs : optional
        As for `zs.compile`: convolutions and recurrent layers are measured at the sizes these inputs give them.
    budget_s : float
        Seconds of timing for each distinct site, and for each format of each distinct shape, at each token count.
    progress : function (done, total, what), optional

    Raises
    ------
    ZeroskipError
        As `zs.compile`, and if there is no model at the path.
    """
    wanted, precision = Tokens.parse(tokens), check_precision(precision)
    expect_seconds("budget_s", budget_s)
    if not isinstance(model, nn.Module):
        model = _load(model)
    elif next(compiled_layers(model := unwrapped(model)), None) is not None:
        model = copy.deepcopy(model)  # only a compiled model has to be turned back, and not the caller's
    thaw(model)
    examples = examples_of(model, wanted, example_inputs)
    sites, notes = plannable(model, precision, examples)
    plain_sites = [site for site in sites if site.name not in examples]
    wanted.check_room(plain_sites)
    answer = Analysis(this_machine(), wanted, notes=notes)
    working_set = site_bytes(sites)
    planner = Planner(wanted, precision, working_set, budget_s)
    shapes = sorted({(*site.shape[1:], _values(site, precision)) for site in plain_sites})
    steps = len(sites) + len(shapes)
    for done, site in enumerate(sites, start=1):
        answer.sites.append(planner.plan(site, answer.notes, examples.get(site.name)))
        if progress is not None:
            progress(done, steps, site.name)
    if (unrest := planner.unrest()) is not None:
        answer.notes.append(unrest)
    for done, (m, k, values) in enumerate(shapes, start=len(sites) + 1):
        found = break_even((m, k), values, wanted.counts, working_set, budget_s)
        answer.break_even[f"{m}x{k} {values}"] = found
        if progress is not None:
            progress(done, steps, f"break-even of {m}x{k}")
    for t in wanted.counts if answer.sites else ():
        answer.gains[t] = dense_ms(answer.sites, t) / chosen_ms(answer.sites, t)
    answer.advice = advise(answer)
    return answer


def advise(answer: Analysis) -> str:
    """Return one sentence: compile it, prune it further or otherwise, or do not bother."""
    sites = answer.sites
    if not sites:
        return "Do not bother: there is no linear layer here that could be packed."
    packed = [site for site in sites if site.is_packed and site.format != "dense"]
    pruned = [site for site in sites if site.pattern != "dense"]
    gains = _each(answer.gains)
    before, after = sum(site.bytes_before for site in sites), sum(site.bytes_after for site in sites)
    size = f"in {after / max(before, 1):.0%} of the bytes"
    if packed and max(answer.gains.values()) >= PAYS:
        return (
            f"Compile it: {len(packed)} of {len(sites)} linear layers run faster sparse, all of them together {gains} "
            f"against the fastest dense layers, {size}."
        )
    integers = [site for site in sites if site.format == "dense" and site.values in LIMIT]
    over = {t: standing_ms(sites, t) / chosen_ms(sites, t) for t in answer.gains} if integers else {}
    if integers and max(over.values()) >= PAYS:
        zeros = any(site.sparsity > BY_ROUNDING for site in sites)
        idle = ", and their zeros gain nothing beyond that here" if zeros else ""
        return (
            f"Compile it: {len(integers)} of {len(sites)} linear layers run faster as dense integers, all of them "
            f"together {_each(over)} against the layers as they are, {size}{idle}."
        )
    if not pruned:
        return f"There is nothing to gain yet, for no layer has zeros: prune it first; {_least(answer)}."
    mean = sum(site.sparsity * site.bytes_before for site in pruned) / sum(site.bytes_before for site in pruned)
    kinds = ", ".join(sorted({site.pattern for site in pruned}))
    head = f"Do not bother to compile it as it is: at {mean:.0%} zeros ({kinds}) no sparse layout pays on this machine"
    if packed:
        head = (
            f"Do not bother: the sparse layouts that win gain less than {PAYS - 1:.0%} over all linear layers ({gains})"
        )
    return f"{head}; {_least(answer)}."


def _least(answer: Analysis) -> str:
    """Say which pattern breaks even first, everywhere, as a hint where to prune to."""
    worst: dict[tuple[str, str], float] = {}
    for found in answer.break_even.values():
        for one in found:
            key = (one.format, one.pattern)
            worst[key] = max(worst.get(key, 0.0), 1.0 if one.sparsity is None else one.sparsity)
    best: dict[str, tuple[float, str]] = {}
    for (name, pattern), sparsity in worst.items():
        if sparsity < best.get(pattern, (1.0, ""))[0]:
            best[pattern] = (sparsity, name)
    if not best:
        return "no format beats the best dense layers here at every token count asked for, at any sparsity tried"
    parts = (f"{pattern} zeros from {sparsity:.0%} on ({name})" for pattern, (sparsity, name) in best.items())
    return "at every shape and token count, sparse beats the best dense with " + " or ".join(parts)


def _values(site: Site, precision: str | None) -> str:
    """The storage for which break-even is measured: the narrowest that is allowed."""
    weight = weights_of(site)[0]
    allowed = allowed_values(weight.dtype, precision, recorded_kinds(site, weight))
    return max(allowed, key=PRECISIONS.index, default="fp32")


def _each(gains: Mapping[int, float]) -> str:
    return ", ".join(f"{gain:.2f}x at {t} token{'s' * (t > 1)}" for t, gain in gains.items())


def _load(path: object) -> nn.Module:
    if not isinstance(path, str | os.PathLike):
        raise ZeroskipError(f"model is a {type(path).__name__}: give an nn.Module or the path of a directory")
    from zeroskip.io.load import load

    return load(Path(path))

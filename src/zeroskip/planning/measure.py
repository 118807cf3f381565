"""Measure one site: every candidate checked against float64 first, then raced, at each token count."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zeroskip.bench.oracle import Oracle
from zeroskip.bench.timer import Race, race
from zeroskip.errors import first_line
from zeroskip.formats import unpack
from zeroskip.planning.candidates import Call, Layout, copies_for, layouts
from zeroskip.planning.machine import cold_bytes

__all__ = ["Measured", "Probe", "bound", "measure", "measure_layouts", "runner_name", "tell_apart"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """Inputs for one measurement.

    Attributes
    ----------
    x : Tensor
        What the calls are given.
    rows : Tensor
        [tokens, k] the same as the weight's matrix sees it.
    flat : callable
        From what a call returns to [tokens, m].
    others : mapping
        By the name of a format or rival: the same numbers as `x`, laid out as that one finds them in a model.
    """

    x: Tensor
    rows: Tensor
    flat: Callable[[Tensor], Tensor]
    others: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Measured:
    """What was found about one site (or about all sites that share its key).

    Attributes
    ----------
    layouts : list of Layout
    races : {tokens: Race}
        Runners are named ``'bitmask bf16/spmm_bitmask_bf16_avx2'``.
    refused : {label: reason}
        Formats that do not accept the weight, rivals not available here.
    wrong : {runner: problem}
        Candidates whose output failed the oracle; they were not timed.
    """

    layouts: list[Layout]
    races: dict[int, Race]
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    def layout(self, label: str) -> Layout:
        return next(layout for layout in self.layouts if layout.label == label)

    def runners(self, label: str, tokens: int) -> list[str]:
        """Return the runners of a layout that were timed at this token count."""
        return [name for name in self.races[tokens].names if _label(name) == label]


def runner_name(layout: Layout, kernel: str) -> str:
    return f"{layout.label}/{kernel}"


def _label(runner: str) -> str:
    return runner.rpartition("/")[0]


def measure(
    module: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    *,
    values: tuple[str, ...],
    tokens: tuple[int, ...],
    working_set_bytes: int,
    budget_s: float = 0.5,
) -> Measured:
    """Measure everything that can run the site.

    Parameters
    ----------
    module : nn.Module
        The dense layer as it stands; it is not modified.
    weight : Tensor [m, k], bias : Tensor [m] or None
        What it computes with.
    values : tuple of str
        Storage that may compete, the model's own first.
    tokens : tuple of int
        Token counts.
    working_set_bytes : int
        Bytes of weights that the whole model touches in one step; capped at `cold_bytes()`: larger ones are no colder.
    budget_s : float
        Seconds of timing at each token count.
    """
    with torch.inference_mode(False), torch.no_grad():  # what is packed here may be installed, so: ordinary tensors
        found, refused = layouts(module, weight, bias, values, max(tokens))
    return measure_layouts(
        found, weight, bias, tokens=tokens, working_set_bytes=working_set_bytes, budget_s=budget_s, refused=refused
    )


def measure_layouts(
    found: list[Layout],
    weight: Tensor,
    bias: Tensor | None,
    *,
    tokens: tuple[int, ...],
    working_set_bytes: int,
    budget_s: float,
    refused: dict[str, str] | None = None,
    probes: Callable[[int], Probe] | None = None,
) -> Measured:
    """As `measure`, for layouts made beforehand; `probes` gives other inputs for a token count than plain rows."""
    result = Measured(found, {}, dict(refused or {}))
    working_set = min(working_set_bytes, cold_bytes())
    with torch.inference_mode():
        field_of = list(copies_for(found, working_set))
        for count in sorted(tokens):
            # Activations larger than the working set push the weights out of the caches by themselves.
            cold = count * sum(weight.shape) * weight.element_size() >= working_set
            probe = plain_probe(weight, count) if probes is None else probes(count)
            runners = _checked(result, field_of, weight, bias, count, 1 if cold else None, probe)
            dense = [name for layout in found if layout.dense for name in runners if _label(name) == layout.label]
            result.races[count] = race(runners, budget_s=budget_s, settled=tell_apart(result), core=dense)
    return result


def _checked(
    result: Measured,
    field_of: list[tuple[Layout, str, list[Call]]],
    weight: Tensor,
    bias: Tensor | None,
    tokens: int,
    copies: int | None,
    probe: Probe,
) -> dict[str, list[Callable[[], object]]]:
    rows = probe.rows
    oracle = Oracle(weight, bias, rows)
    # Integers say what they mean themselves: how far that is from the model's weight is the precision asked for.
    own = {
        layout.label: Oracle(unpack(layout.packed), bias, rows, layout.packed.group_size)
        for layout in result.layouts
        if layout.packed is not None and layout.packed.group_size
    }
    runners: dict[str, list[Callable[[], object]]] = {}
    for layout, kernel, calls in field_of:
        name, x = runner_name(layout, kernel), probe.others.get(layout.format, probe.x)
        if name in result.wrong:
            continue
        try:
            problem = own.get(layout.label, oracle).problem(probe.flat(calls[0](x)), layout.values)
        except RuntimeError as error:
            problem = f"failed: {first_line(error)}"
        if problem is not None and layout is not result.layouts[0]:
            log.error("%s at %d tokens %s; it is not used", name, tokens, problem)
            result.wrong[name] = f"at {tokens} tokens {problem}"
            for past in result.races.values():
                past.samples.pop(name, None)
            continue
        if problem is not None:  # the layer as it stands is what the model means, right or not
            log.warning("the model's own layer at %d tokens %s", tokens, problem)
        runners[name] = [bound(call, x) for call in calls[:copies]]
    return runners


def plain_probe(weight: Tensor, tokens: int) -> Probe:
    """Return random rows [tokens, k] for a linear layer."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, weight.shape[1], generator=generator).to(weight.dtype)
    return Probe(x, x, lambda y: y)


def bound(call: Call, x: Tensor) -> Callable[[], object]:
    """Return the call with its activations, to be timed."""
    return lambda: call(x)


def tell_apart(result: Measured) -> Callable[[Race], bool]:
    """Return the question that a race of these layouts has to settle.

    Each running candidate is clearly ahead of or behind the fastest dense one, or level with it within 1.5 %; and
    behind the fastest of all, or level with it within 3 %: else which of two sparse ones is chosen would be luck.
    """
    dense_labels = {layout.label for layout in result.layouts if layout.dense}

    def settled(seen: Race) -> bool:
        running = seen.running
        dense = [name for name in seen.names if _label(name) in dense_labels]
        if not dense:
            return True
        best = seen.fastest(dense)
        for name in running:
            if name == best:
                continue
            ratio = seen.ratio(best, name)
            apart = ratio.low > 1.0 or ratio.high < 0.98
            if not apart and ratio.noise > 0.015:
                return False
        leader = seen.fastest(running)
        behind = [seen.ratio(name, leader) for name in running if name not in (leader, best)]
        return leader == best or all(ratio.low > 1.0 or ratio.noise <= 0.03 for ratio in behind)

    return settled

"""A layer taken apart as a whole: its products are planned one by one, then ours races the layer as it was."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.bench.timer import Race, Ratio, race
from zeroskip.errors import ZeroskipError, first_line
from zeroskip.planning.install import build_split
from zeroskip.planning.plan import SitePlan
from zeroskip.planning.shaped import Example
from zeroskip.sites import Site

__all__ = ["settle"]

log = logging.getLogger(__name__)
Given = tuple[tuple[Any, ...], dict[str, Any]]

SLOWER = 0.98  # below this a call is slower
WORSE = 32.0  # times torch's own error against fp64: what the layer taken apart may have
FLOOR = {"fp32": 1e-4}  # outputs are at most one in size; an error that no use would show
LOW = 5e-2  # weights stored in less were asked for


def settle(
    choices: list[SitePlan], sites: Sequence[Site], example: Example, tokens: int, budget_s: float, notes: list[str]
) -> tuple[list[SitePlan], nn.Module]:
    """Return what is installed in the place of a layer taken apart, and the choices as they then stand.

    Parameters
    ----------
    choices : list of SitePlan
        Of its products, each measured by itself.
    sites : sequence of Site
        In the same order; all of one module.
    example : Example
        Of the layer's input, or with the calls themselves: it has to be faster in one of them and slower in none.
    tokens : int
        The largest count to be good at.
    """
    old = sites[0].module
    if not any(choice.is_packed for choice in choices):
        return [_stayed(choice, "no product of this layer gained by being packed") for choice in choices], old
    try:
        new = build_split(choices, sites, tokens)
    except ZeroskipError as error:  # of a stack, the first product stood for all
        return [_stayed(choice, str(error)) for choice in choices], old
    draw = torch.Generator().manual_seed(len(choices))
    x = torch.randn(example.shape, generator=draw).to(next(old.parameters()).dtype)
    calls: list[Given] = [(args, kwargs) for _, args, kwargs in example.calls] or [((x,), {})]
    with torch.inference_mode():
        problem = _problem(old, new, calls, choices)
        if problem is None:
            ratios = [_raced(old, new, given, budget_s) for given in calls]
            found = ", ".join(f"{ratio.value:.2f}x" for ratio in ratios)
            if max(ratio.low for ratio in ratios) > 1.0 and min(ratio.value for ratio in ratios) >= SLOWER:
                for choice in choices:
                    choice.reason = f"the whole layer is {found} as fast as torch's own; by itself, {choice.reason}"
                return choices, new
            one = "one step after another" if isinstance(old, nn.RNNBase) else "one product after another"
            why = f"torch's own layer is faster than {one} ({found})"
        else:
            why = f"taken apart it {problem}"
            notes.append(f"{sites[0].owner}: {why}; not used")
    log.info("%s: %s", sites[0].owner, why)
    return [_stayed(choice, why) for choice in choices], old


def _raced(old: nn.Module, new: nn.Module, given: Given, budget_s: float) -> Ratio:
    args, kwargs = given
    both: dict[str, list[Any]] = {"torch": [lambda: old(*args, **kwargs)], "ours": [lambda: new(*args, **kwargs)]}
    return race(both, budget_s=2 * budget_s, settled=_settled, retire=True).ratio("torch", "ours")


def _problem(old: nn.Module, new: nn.Module, calls: Sequence[Given], choices: Sequence[SitePlan]) -> str | None:
    exact = copy.deepcopy(old).double()
    found = (_off(old, new, exact, *given, choices) for given in calls)
    return next((problem for problem in found if problem is not None), None)


def _off(
    old: nn.Module,
    new: nn.Module,
    exact: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    choices: Sequence[SitePlan],
) -> str | None:
    wide: Any = [_double(each) for each in args], {name: _double(each) for name, each in kwargs.items()}
    try:
        want = _first(inspect.unwrap(type(exact).forward)(exact, *wide[0], **wide[1]))
        torchs, ours = _first(old(*args, **kwargs)), _first(new(*args, **kwargs))
    except (RuntimeError, TypeError, ZeroskipError) as error:
        return f"does not run: {first_line(error)}"
    if ours.shape != torchs.shape or ours.dtype != torchs.dtype:
        return f"gives {ours.dtype} {list(ours.shape)} where torch gives {torchs.dtype} {list(torchs.shape)}"
    own, found = float((torchs.double() - want).abs().max()), float((ours.double() - want).abs().max())
    low = max(FLOOR.get(choice.values, LOW) for choice in choices) * max(1.0, float(want.abs().max()))
    return None if found <= max(WORSE * own, low) else f"is off by {found:.2g} where torch is by {own:.2g}"


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _settled(seen: Race) -> bool:
    ratio = seen.ratio("torch", "ours")
    return ratio.low > 1.0 or ratio.high < 0.95


def _stayed(choice: SitePlan, why: str) -> SitePlan:
    choice.format, choice.values, choice.kernels = "linear", choice.dtype, [(None, "torch")]
    choice.bytes_after = choice.bytes_before
    choice.reason = f"{why}; by itself, {choice.reason}"
    return choice

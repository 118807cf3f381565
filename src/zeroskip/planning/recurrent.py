"""A recurrent layer as a whole: its products are planned one by one, then ours races torch's own layer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from zeroskip.bench.timer import Race, race
from zeroskip.planning.install import build_split
from zeroskip.planning.plan import SitePlan
from zeroskip.planning.shaped import Example
from zeroskip.sites import Site

__all__ = ["settle"]

log = logging.getLogger(__name__)

WORSE = 32.0  # times torch's own error against fp64: what the layer taken apart may have
FLOOR = {"fp32": 1e-4}  # outputs are at most one in size; an error that no use would show
LOW = 5e-2  # weights stored in less were asked for


def settle(
    choices: list[SitePlan], sites: Sequence[Site], example: Example, tokens: int, budget_s: float, notes: list[str]
) -> tuple[list[SitePlan], nn.Module]:
    """Return what is installed in the place of a recurrent layer, and the choices as they then stand.

    Parameters
    ----------
    choices : list of SitePlan
        Of its products, each measured by itself.
    sites : sequence of Site
        In the same order; all of one module.
    example : Example
        Of the layer's input.
    tokens : int
        The largest count to be good at.
    """
    old = cast(nn.RNNBase, sites[0].module)
    if not any(choice.is_packed for choice in choices):
        return [_stayed(choice, "no product of this layer gained by being packed") for choice in choices], old
    new = build_split(choices, sites, tokens)
    draw = torch.Generator().manual_seed(len(choices))
    x = torch.randn(example.shape, generator=draw).to(next(old.parameters()).dtype)
    with torch.inference_mode():
        problem = _problem(old, new, x, choices)
        if problem is None:
            both: dict[str, list[Any]] = {"torch": [lambda: old(x)], "ours": [lambda: new(x)]}
            seen = race(both, budget_s=2 * budget_s, settled=_settled, retire=True)
            ratio = seen.ratio("torch", "ours")
            if ratio.low > 1.0:
                head = f"the whole layer is {ratio.value:.2f}x as fast as torch's own"
                for choice in choices:
                    choice.reason = f"{head}; by itself, {choice.reason}"
                return choices, new
            why = f"torch's own layer is faster than one step after another ({ratio.value:.2f}x)"
        else:
            why = f"taken apart it {problem}"
            notes.append(f"{sites[0].owner}: {why}; not used")
    log.info("%s: %s", sites[0].owner, why)
    return [_stayed(choice, why) for choice in choices], old


def _problem(old: nn.RNNBase, new: nn.Module, x: Tensor, choices: Sequence[SitePlan]) -> str | None:
    want = copy.deepcopy(old).double()(x.double())[0]
    own = float((old(x)[0].double() - want).abs().max())
    found = float((new(x)[0].double() - want).abs().max())
    low = max(FLOOR.get(choice.values, LOW) for choice in choices)
    return None if found <= max(WORSE * own, low) else f"is off by {found:.2g} where torch is by {own:.2g}"


def _settled(seen: Race) -> bool:
    ratio = seen.ratio("torch", "ours")
    return ratio.low > 1.0 or ratio.high < 0.95


def _stayed(choice: SitePlan, why: str) -> SitePlan:
    choice.format, choice.values, choice.kernels = "linear", choice.dtype, [(None, "torch")]
    choice.bytes_after = choice.bytes_before
    choice.reason = f"{why}; by itself, {choice.reason}"
    return choice

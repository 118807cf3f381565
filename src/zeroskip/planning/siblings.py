"""Packed layers that are fed the same tensor: found by tracing one forward, raced, and joined where that is faster.

Queries, keys and values of an attention, gate and up of an MLP read one tensor. Computed in one call they save what is
done for each call alike: the checks of the input, the dispatcher, the threads' start. Their weights are not merged:
each stays the layer's own, mapped from its file, and on disk nothing is different.

Measured on one AVX2 core at one token, layers of 384 inputs: queries, keys and values together 1.39x as fast as one
after the other; packed anew as one weight 1.24x. At 2048 inputs the products take all the time and nothing is gained.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.bench.timer import race
from zeroskip.nn import PackedLinear, Siblings
from zeroskip.planning.plan import Fused

__all__ = ["find_siblings", "fuse", "join", "part"]

log = logging.getLogger(__name__)

SLOWER = 0.98  # as for a site: no count may be slower than this
BUDGET_S = 0.3  # seconds for each kind of group at each token count
Call = Callable[[], object]


def find_siblings(model: nn.Module, call: Call) -> list[list[str]]:
    """Return the groups of packed layers that one forward feeds the same tensor, each in the order of its calls.

    Followed by identity, and checked: the values must be the same at each call, and a layer that runs more than once
    in a forward is in no group.

    Parameters
    ----------
    model : nn.Module
        Not modified.
    call : function
        Runs the model once, eagerly.
    """
    seen: dict[int, tuple[Tensor, Tensor, list[str]]] = {}  # the tensors are held, so that no address comes again
    counts: dict[str, int] = {}
    changed: set[int] = set()

    def note(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        counts[name] = counts.get(name, 0) + 1
        if not arguments:  # called with keywords
            return
        x = arguments[0]
        if id(x) not in seen:
            seen[id(x)] = (x, x.clone(), [name])
            return
        _, before, names = seen[id(x)]
        names.append(name)
        if before.shape != x.shape or not torch.equal(before, x):
            changed.add(id(x))

    layers = _linear_layers(model)
    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in layers.items()]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    groups = [[n for n in names if counts[n] == 1] for key, (_, _, names) in seen.items() if key not in changed]
    return [names for names in groups if len(names) > 1]


def _linear_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers that multiply and nothing else: convolutions and tables, which derive from them, do more."""
    return {name: module for name, module in model.named_modules() if type(module) is PackedLinear}


def fuse(model: nn.Module, call: Call, counts: Sequence[int]) -> list[Fused]:
    """Find groups, race each kind of them joined against apart, and join those that gain.

    Parameters
    ----------
    model : nn.Module
        Compiled; modified where a group gains.
    counts : sequence of int
        Token counts: a group is joined if it is at least 0.98x as fast at each and faster over all.

    Returns
    -------
    list of Fused
        The groups that were joined.
    """
    part(model)
    with torch.inference_mode(False), torch.no_grad():
        groups = find_siblings(model, call)
    kinds: dict[tuple[Any, ...], list[list[str]]] = {}
    layers = _linear_layers(model)
    for names in groups:
        key = tuple(_kind(layers[name]) for name in names)
        kinds.setdefault(key, []).append(names)
    joined: list[Fused] = []
    floats = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    dtype = next(floats, torch.float32)
    for alike in kinds.values():
        siblings = [Siblings([layers[name] for name in names]) for names in alike]
        ratios = {count: _ratio(siblings, count, dtype) for count in counts}
        gain = math.prod(ratios.values()) ** (1 / len(ratios))
        log.info("%s and %d more like it: together %.2fx", " + ".join(alike[0]), len(alike) - 1, gain)
        if min(ratios.values()) < SLOWER or gain <= 1:
            continue
        for names, group in zip(alike, siblings, strict=True):
            group.join()
            joined.append(Fused(names, ratios))
    return joined


def join(model: nn.Module, groups: Iterable[Fused]) -> None:
    """Join the groups that a plan names, where all their layers are packed ones of this model."""
    layers = dict(model.named_modules())
    for group in groups:
        found = [layers.get(name) for name in group.names]
        packed = [layer for layer in found if isinstance(layer, PackedLinear)]
        if len(packed) == len(found) > 1 and len({layer.in_features for layer in packed}) == 1:
            Siblings(packed).join()


def part(model: nn.Module) -> None:
    """Let every packed layer of a model be computed by itself."""
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.siblings is not None:
            module.siblings.part()


def _kind(layer: PackedLinear) -> tuple[Any, ...]:
    packed = layer.packed
    return (*packed.shape, packed.format, packed.values, packed.pattern, layer.bias is not None)


def _ratio(groups: Sequence[Siblings], tokens: int, dtype: torch.dtype) -> float:
    """Return the time apart over the time together; the groups take turns, so that weights are as cold as can be."""
    first = groups[0].layers[0]
    x = torch.randn(tokens, first.in_features, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    half = len(groups) // 2

    def apart(group: Siblings) -> None:
        with torch.inference_mode():
            for layer in group.layers:
                layer(x)

    def together(group: Siblings) -> None:
        group.join()
        with torch.inference_mode():
            for layer in group.layers:
                layer(x)
        group.part()

    runners: Mapping[str, list[Call]] = {
        "apart": [partial(apart, group) for group in groups],
        "together": [partial(together, group) for group in (*groups[half:], *groups[:half])],
    }
    return race(runners, budget_s=BUDGET_S, retire=False).ratio("apart", "together").value

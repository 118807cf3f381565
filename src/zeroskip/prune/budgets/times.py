"""Milliseconds: what a layer takes on this machine with a share of zeros, measured with the kernels that `compile` has.

For every distinct shape, random weights with zeros in the pattern of the layer are packed in every format that accepts
them, checked and raced against the dense layers, as `compile` does, at a few shares of zeros. A layer takes the least
of the fastest dense time and the line through its sparse times.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zeroskip.errors import ZeroskipError
from zeroskip.planning.candidates import NAMES, allowed_values, check_precision
from zeroskip.planning.measure import measure
from zeroskip.prune.budgets.base import Floats, Item
from zeroskip.prune.budgets.costs import Cost, example, line, samples
from zeroskip.sites import LinearAdapter

__all__ = ["Milliseconds", "time_ms"]

log = logging.getLogger(__name__)

SECONDS = 0.3  # of timing for each share of zeros


class Milliseconds(Cost):
    """The sum over the layers of the time of one pass of `tokens` tokens (1) on `threads` threads (the process's).

    `precision` as `compile` has it: None times storage in the model's own type only, and what is rounded to integers
    down to those.
    """

    name = "ms"
    options = ("tokens", "threads", "precision")
    shares = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        for key in ("tokens", "threads"):
            value = options.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ZeroskipError(f"target: {key} is {value!r}: give a whole number of at least 1")
        check_precision(options.get("precision"))
        self.seen: dict[Any, tuple[float, Floats, Floats]] = {}
        self.working_set_bytes = 0

    def prepare(self, items: Sequence[Item]) -> None:
        """Note how many bytes the layers have together: they are timed as cold as they are inside the model."""
        if not any(issubclass(item.site.adapter, LinearAdapter) for item in items):
            raise ZeroskipError("target: ms counts linear layers, and none is in the recipe: take bytes or flops")
        self.working_set_bytes = sum(item.numel * item.site.weight().element_size() for item in items)

    def of(self, item: Item, sparsity: Floats) -> Floats:
        if not issubclass(item.site.adapter, LinearAdapter):  # what compile leaves alone takes the time it takes
            return np.zeros(np.shape(sparsity))
        key = (*item.site.shape, item.site.weight().dtype, item.settings.pattern, item.settings.integers)
        if key not in self.seen:
            self.seen[key] = self._measured(item)
        dense, shares, sparse = self.seen[key]
        return np.minimum(dense, line(sparsity, shares, sparse)) if len(shares) else np.full(np.shape(sparsity), dense)

    def _measured(self, item: Item) -> tuple[float, Floats, Floats]:
        """Return the dense time, and the shares of zeros for which there are sparse times, with those."""
        integers = item.settings.integers
        precision = self.given.get("precision") if integers is None else integers.values
        dense: list[float] = []
        found: dict[float, float] = {}
        log.info("timing %s (%dx%d)", item.site.name, *item.site.shape[1:])
        with _threads(self.given.get("threads")):
            for share in samples(item, self.shares):
                weight = example(item, share)
                if allowed_values(item.site.weight().dtype, precision) == ():
                    kind = NAMES.get(item.site.weight().dtype, "such")
                    raise ZeroskipError(f"{item.site.name}: {kind} weights have no kernels: give target a precision")
                best, sparse = time_ms(weight, self.given.get("tokens") or 1, precision, self.working_set_bytes)
                dense.append(best)
                if sparse is not None:
                    found[float(share)] = sparse
        sparse_times = np.minimum.accumulate(np.array(list(found.values())))
        return float(np.median(dense)), np.array(list(found)), sparse_times


def time_ms(weight: Tensor, tokens: int, precision: str | None, working_set_bytes: int) -> tuple[float, float | None]:
    """Return the time of the fastest dense way to run a layer, and of the fastest sparse one, None if there is none."""
    m, k = weight.shape
    layer = nn.Linear(k, m, bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    values = allowed_values(weight.dtype, precision)
    found = measure(
        layer, weight, None, values=values, tokens=(tokens,), working_set_bytes=working_set_bytes, budget_s=SECONDS
    )
    race = found.races[tokens]
    times: dict[bool, list[float]] = {True: [], False: []}
    for layout in found.layouts:
        times[layout.dense] += [race.median(name) * 1e3 for name in found.runners(layout.label, tokens)]
    return min(times[True]), min(times[False], default=None)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)

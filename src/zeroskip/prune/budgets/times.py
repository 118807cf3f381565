"""Milliseconds: what a layer takes on this machine with a share of zeros, measured with the kernels that `compile` has.

For every distinct shape, random weights with zeros in the pattern of the layer are packed in every format that accepts
them, checked and raced against the dense layers, as `compile` does, at a few shares of zeros. A layer takes the least
of the fastest dense time and the lines through the times of each sparse layout. One line through the least of them
would cut the corner where two layouts change places, and promise there what neither holds.

Kernels work through a row in steps, so that with rows of equal length the times are a staircase, which lines through a
few points miss by 5 to 10 %. So what was decided is timed too, and decided again by what that shows, until both agree.
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
NEAR = 0.005  # shares that are one


class Milliseconds(Cost):
    """The sum over the layers of the time of one pass of `tokens` tokens (1) on `threads` threads (the process's).

    `precision` as `compile` has it: None times storage in the model's own type only, and what is rounded to integers
    down to those.
    """

    name = "ms"
    options = ("tokens", "threads", "precision")
    shares = (0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)  # closer where sparse layers pay and curves bend

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        for key in ("tokens", "threads"):
            value = options.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ZeroskipError(f"target: {key} is {value!r}: give a whole number of at least 1")
        check_precision(options.get("precision"))
        self.curves: dict[Any, _Curve] = {}
        self.working_set_bytes = 0

    def prepare(self, items: Sequence[Item]) -> None:
        """Note how many bytes the layers have together: they are timed as cold as they are inside the model."""
        if not any(issubclass(item.site.adapter, LinearAdapter) for item in items):
            raise ZeroskipError("target: ms counts linear layers, and none is in the recipe: take bytes or flops")
        self.working_set_bytes = sum(item.numel * item.site.weight().element_size() for item in items)

    def of(self, item: Item, sparsity: Floats) -> Floats:
        if not issubclass(item.site.adapter, LinearAdapter):  # what compile leaves alone takes the time it takes
            return np.zeros(np.shape(sparsity))
        return self._curve(item).of(sparsity)

    def checked(self, items: Sequence[Item], shares: Sequence[float]) -> float:
        """Time the layers at these shares."""
        pairs = [(i, s) for i, s in zip(items, shares, strict=True) if issubclass(i.site.adapter, LinearAdapter)]
        before = sum(float(self.of(item, np.array([share]))[0]) for item, share in pairs)
        for item, share in pairs:
            curve = self._curve(item)
            if share > 0 and float(curve.of(np.array([share]))[0]) < curve.dense and not curve.knows(share):
                self._time(item, curve, share)
        after = sum(float(self.of(item, np.array([share]))[0]) for item, share in pairs)
        log.info("decided by %.4g ms, measured there %.4g ms", before, after)
        return after - before

    def _curve(self, item: Item) -> _Curve:
        """What was measured of layers like this one."""
        settings, dtype = item.settings, item.site.weight().dtype
        scope = settings.composition.method.scope
        key = (*item.site.shape, dtype, settings.pattern, settings.integers, scope)
        if key not in self.curves:
            log.info("timing %s (%dx%d)", item.site.name, *item.site.shape[1:])
            self.curves[key] = _Curve()
            for share in samples(item, self.shares):
                self._time(item, self.curves[key], float(share))
        return self.curves[key]

    def _time(self, item: Item, curve: _Curve, share: float) -> None:
        integers = item.settings.integers
        precision = self.given.get("precision") if integers is None else integers.values
        weight = example(item, share)
        if allowed_values(item.site.weight().dtype, precision) == ():
            kind = NAMES.get(item.site.weight().dtype, "such")
            raise ZeroskipError(f"{item.site.name}: {kind} weights have no kernels: give target a precision")
        with _threads(self.given.get("threads")):
            curve.add(share, *time_ms(weight, self.given.get("tokens") or 1, precision, self.working_set_bytes))


class _Curve:
    """Times of one shape of layer, by shares of zeros."""

    def __init__(self) -> None:
        self.dense_times: list[float] = []
        self.sparse: dict[str, dict[float, float]] = {}
        self.lines: list[tuple[Floats, Floats]] = []

    @property
    def dense(self) -> float:
        return float(np.median(self.dense_times))

    def knows(self, share: float) -> bool:
        return any(abs(share - known) < NEAR for times in self.sparse.values() for known in times)

    def add(self, share: float, dense: float, sparse: Mapping[str, float]) -> None:
        self.dense_times.append(dense)
        for label, time in sparse.items():
            self.sparse.setdefault(label, {})[share] = time
        ordered = [sorted(times.items()) for times in self.sparse.values()]
        self.lines = [
            (np.array([share for share, _ in each]), np.minimum.accumulate([time for _, time in each]))
            for each in ordered
        ]

    def of(self, sparsity: Floats) -> Floats:
        found = np.full(np.shape(sparsity), self.dense)
        for shares, times in self.lines:
            found = np.minimum(found, line(sparsity, shares, times))
        return found


def time_ms(
    weight: Tensor, tokens: int, precision: str | None, working_set_bytes: int
) -> tuple[float, dict[str, float]]:
    """Return the time of the fastest dense way to run a layer, and of each sparse layout with its fastest kernel."""
    m, k = weight.shape
    layer = nn.Linear(k, m, bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    values = allowed_values(weight.dtype, precision)
    found = measure(
        layer, weight, None, values=values, tokens=(tokens,), working_set_bytes=working_set_bytes, budget_s=SECONDS
    )
    race = found.races[tokens]
    dense: list[float] = []
    sparse: dict[str, float] = {}
    for layout in found.layouts:
        times = [race.median(name) * 1e3 for name in found.runners(layout.label, tokens)]
        if layout.dense:
            dense += times
        elif times:
            sparse[layout.label] = min(times)
    return min(dense), sparse


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)

"""What a layer costs with a share of zeros: weights, operations, bytes. Milliseconds are in times.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from zeroskip.errors import ZeroskipError
from zeroskip.formats import get, names, pack
from zeroskip.formats.blob import VALUES
from zeroskip.planning.candidates import DENSE_FORMATS, NAMES, check_precision
from zeroskip.prune.budgets.base import Floats, Item

__all__ = ["Bytes", "Cost", "Flops", "Params", "example", "line", "samples"]


class Cost:
    """A unit in which a target can be given. Subclassing registers it.

    Attributes
    ----------
    options : tuple of str
        What may stand beside the target.
    """

    known: ClassVar[dict[str, type[Cost]]] = {}
    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            Cost.known[cls.name] = cls

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.given = options

    def prepare(self, items: Sequence[Item]) -> None:
        """Be told all layers that count, before the first question."""

    def of(self, item: Item, sparsity: Floats) -> Floats:
        """Return the cost of a layer at each of these shares of zeros; it never rises with them."""
        raise NotImplementedError

    def checked(self, items: Sequence[Item], shares: Sequence[float]) -> float:
        """Be told what was decided; return how much more than the sum of `of` it turns out to cost."""
        return 0.0


class Params(Cost):
    """Weights that are not zero."""

    name = "params"

    def of(self, item: Item, sparsity: Floats) -> Floats:
        return item.numel * (1 - sparsity)


class Flops(Cost):
    """Two for every weight that is not zero, for each use of the layer."""

    name = "flops"

    def of(self, item: Item, sparsity: Floats) -> Floats:
        return 2 * item.uses * item.numel * (1 - sparsity)


class Bytes(Cost):
    """What the smallest of our formats stores, dense ones among them.

    Each format packs random weights of every shape at three shares of zeros; between them its size is a straight line.
    """

    name = "bytes"
    options = ("precision",)
    shares = (0.05, 0.5, 0.95)

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        check_precision(options.get("precision"))
        self.seen: dict[Any, tuple[float, list[Floats]]] = {}

    def of(self, item: Item, sparsity: Floats) -> Floats:
        groups, *shape = item.site.shape
        values = self._values(item)
        size = None if item.settings.integers is None else item.settings.integers.group_size
        key = (*shape, item.settings.pattern, values, size)
        if key not in self.seen:
            self.seen[key] = self._measured(item, values, size)
        dense, sparse = self.seen[key]
        shares = samples(item, self.shares)
        found = np.full(np.shape(sparsity), dense)
        for sizes in sparse:
            found = np.minimum(found, line(sparsity, shares, sizes))
        return groups * found

    def _values(self, item: Item) -> str:
        if item.settings.integers is not None:
            return item.settings.integers.values
        own = NAMES.get(item.site.weight().dtype, "")
        return self.given.get("precision") or (own if own in VALUES else "bf16")

    def _measured(self, item: Item, values: str, size: int | None) -> tuple[float, list[Floats]]:
        examples = [example(item, share) for share in samples(item, self.shares)]
        sizes: dict[str, list[float]] = {}
        for name in names():
            if values in get(name).values and all(get(name).accepts(each) is None for each in examples):
                sizes[name] = [float(pack(each, name, values, size).nbytes) for each in examples]
        dense = min(found[0] for name, found in sizes.items() if name in DENSE_FORMATS)
        return dense, [np.array(found) for name, found in sizes.items() if name not in DENSE_FORMATS]


def example(item: Item, share: float) -> Tensor:
    """Return random weights [out, in] in the layer's type (bf16 for fp16), with zeros in its pattern."""
    weight = item.site.weight()
    draw = torch.Generator().manual_seed(0)
    made = torch.randn(weight.shape[1:], generator=draw)
    score = torch.rand(made.shape, generator=draw)
    pattern = item.settings.pattern
    if pattern.steps is not None:
        pattern = pattern.with_kept(round((1 - share) * pattern.steps))
    # Rows of equal length take another time than rows of many lengths: a kernel works through each in steps.
    made *= pattern.select(score, share, item.settings.composition.method.scope)
    return made.to(torch.bfloat16 if weight.dtype == torch.float16 else weight.dtype)


def samples(item: Item, shares: tuple[float, ...]) -> Floats:
    """The shares nearest to these that the pattern can have."""
    steps = item.steps
    if steps is None:
        return np.array(shares)
    if len(steps) < 2:
        raise ZeroskipError(f"{item.site.name}: its pattern has no sparse form")
    return np.unique([steps[1:][np.abs(steps[1:] - share).argmin()] for share in shares])


def line(sparsity: Floats, shares: Floats, values: Floats) -> Floats:
    """Piecewise straight through the samples, the ends prolonged, never rising."""
    if len(shares) == 1:
        return np.where(sparsity >= shares[0], values[0], np.inf)
    at = np.clip(np.searchsorted(shares, sparsity) - 1, 0, len(shares) - 2)
    slope = (values[at + 1] - values[at]) / (shares[at + 1] - shares[at])
    return np.asarray(values[at] + np.minimum(slope, 0.0) * (sparsity - shares[at]))

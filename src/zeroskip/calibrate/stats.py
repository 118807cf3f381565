"""Statistics of what flows into the sites: mergeable accumulators, filled by hooks while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zeroskip.errors import ZeroskipError
from zeroskip.model import Site

__all__ = ["Collector", "Gram", "SharingError", "Stat", "Sum", "SumOfSquares"]


class Stat:
    """One statistic of one site. Two halves of the data merged equal the whole, to rounding."""

    known: ClassVar[dict[str, type[Stat]]] = {}
    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        Stat.known[cls.name] = cls

    def __init__(self) -> None:
        self.total: Tensor | None = None

    @staticmethod
    def of(x: Tensor) -> Tensor:
        """Return the statistic of one batch, x [groups, tokens, in] fp32."""
        raise NotImplementedError

    def update(self, x: Tensor) -> None:
        self.add(self.of(x))

    def merge(self, other: Stat) -> None:
        if other.total is not None:
            self.add(other.total)

    def add(self, part: Tensor) -> None:
        self.total = part.clone() if self.total is None else self.total.add_(part)


class Sum(Stat):
    """Sum over tokens of x_j, [groups, in] fp32 (each batch summed in fp64)."""

    name = "sum"

    @staticmethod
    def of(x: Tensor) -> Tensor:
        return x.sum(1, dtype=torch.float64).float()


class SumOfSquares(Stat):
    """Sum over tokens of x_j^2, [groups, in] fp32 (each batch summed in fp64)."""

    name = "sumsq"

    @staticmethod
    def of(x: Tensor) -> Tensor:
        return x.double().square_().sum(1).float()


class Gram(Stat):
    """G = X^T X, [groups, in, in] fp32."""

    name = "gram"

    @staticmethod
    def of(x: Tensor) -> Tensor:
        return x.transpose(1, 2) @ x


class SharingError(Exception):
    """Two sites that shared their input in one run did not in another; collect again without sharing."""


class _Tally:
    """The statistics of one site, or a reference to the site whose input it shares."""

    def __init__(self, needs: Iterable[str]) -> None:
        self.stats = {need: Stat.known[need]() for need in needs}
        self.tokens = 0
        self.calls = 0
        self.leader: _Tally | None = None


class Collector:
    """Hooks on sites that fill their statistics while the model runs.

    Sites that are called with the very same tensor (query, key and value; gate and up) share one accumulator.

    Parameters
    ----------
    sites : iterable of Site
    needs : iterable of str
        Names in `Stat.known`.
    visible : callable
        (input tensor [..., in]) -> bool mask over its leading dimensions, True where a token counts, or None for all.
    share : bool
        Whether shared inputs are looked for.

    Raises
    ------
    ZeroskipError
        While the model runs, if an input of a site holds NaN or Inf.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        needs: Iterable[str],
        visible: Callable[[Tensor], Tensor | None],
        share: bool = True,
    ) -> None:
        self.visible, self.share = visible, share
        needs = tuple(needs)
        self.tallies = {site.name: _Tally(needs) for site in sites}
        self.seen: dict[int, tuple[Tensor, _Tally]] = {}
        self.handles = [
            site.module.register_forward_pre_hook(self._hook(site, self.tallies[site.name]), with_kwargs=True)
            for site in sites
        ]

    def _hook(self, site: Site, tally: _Tally) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            tally.calls += 1
            shared = self.seen.get(id(x))
            leader = shared[1] if shared is not None and self.share else None
            if leader is tally:
                leader = None
            if tally.calls > 1 and leader is not tally.leader:
                raise SharingError(site.name)
            tally.leader = leader
            if leader is not None:
                return
            self.seen.setdefault(id(x), (x, tally))  # holds x, so that its id is not given away during the run
            self._count(site, tally, x)

        return hook

    def _count(self, site: Site, tally: _Tally, x: Tensor) -> None:
        keep = self.visible(x)
        tokens = site.inputs(x.detach())
        if keep is not None:
            tokens = tokens[:, keep.reshape(-1).to(tokens.device)]
        if tokens.shape[1] == 0:
            return
        tokens = tokens.float()
        if not bool(torch.isfinite(tokens).all()):
            raise ZeroskipError(
                f"{site.name}: its calibration input holds NaN or Inf; check the data and the model's dtype"
            )
        tally.tokens += tokens.shape[1]
        for stat in tally.stats.values():
            stat.update(tokens)

    def next_run(self) -> None:
        """Forget the tensors of the last forward call."""
        self.seen.clear()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.seen.clear()

    def result(self, site: Site) -> tuple[int, dict[str, Tensor]]:
        """Return (tokens counted, {name: [groups, ...]}) of a site; no statistics where no token was counted.

        Raises
        ------
        SharingError
            If the site it shared with was called more often.
        """
        tally = self.tallies[site.name]
        if tally.leader is not None:
            if tally.leader.calls != tally.calls:
                raise SharingError(site.name)
            tally = tally.leader
        totals = {name: stat.total for name, stat in tally.stats.items() if stat.total is not None}
        for name, total in totals.items():
            if not bool(torch.isfinite(total).all()):
                raise ZeroskipError(
                    f"{site.name}: the statistic {name!r} of its inputs overflows float32; scale the data"
                )
        return tally.tokens, totals

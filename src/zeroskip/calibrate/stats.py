"""Statistics of what flows into the sites: mergeable accumulators, filled by hooks while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zeroskip.errors import ZeroskipError
from zeroskip.sites import Call, Inputs, Site

__all__ = ["Collector", "Gram", "SharingError", "Stat", "Sum", "SumOfSquares"]


class Stat:
    """One statistic of one site. Two halves of the data merged equal the whole, to rounding."""

    known: ClassVar[dict[str, type[Stat]]] = {}
    name: ClassVar[str]
    wants: ClassVar[float] = 0.5  # tokens for each input, below which what is made of it gets worse

    def __init_subclass__(cls) -> None:
        Stat.known[cls.name] = cls

    def __init__(self) -> None:
        self.total: Tensor | None = None

    @staticmethod
    def of(x: Tensor) -> Tensor:
        """Return the statistic of one batch, x [groups, tokens, in] fp32."""
        raise NotImplementedError

    @staticmethod
    def blind(total: Tensor) -> Tensor:
        """Return what stands in for the statistic of a group that no token reached, [...]: inputs alike and apart."""
        raise NotImplementedError

    def update(self, x: Inputs) -> None:
        """Count one batch; where groups differ in how many tokens they have, x is a list, one [tokens, in] a group."""
        self.add(self.of(x) if isinstance(x, Tensor) else torch.cat([self.of(each.unsqueeze(0)) for each in x]))

    def merge(self, other: Stat) -> None:
        if other.total is not None:
            self.add(other.total)

    def add(self, part: Tensor) -> None:
        if self.total is None:
            self.total = part.clone()
        elif self.total.shape == part.shape:
            self.total.add_(part)
        else:  # one for all groups, and one a group
            self.total = self.total + part


class Sum(Stat):
    """Sum over tokens of x_j, [groups, in] fp32 (each batch summed in fp64)."""

    name = "sum"

    @staticmethod
    def of(x: Tensor) -> Tensor:
        return x.sum(1, dtype=torch.float64).float()

    @staticmethod
    def blind(total: Tensor) -> Tensor:
        return torch.zeros_like(total)


class SumOfSquares(Stat):
    """Sum over tokens of x_j^2, [groups, in] fp32 (each batch summed in fp64)."""

    name = "sumsq"

    @staticmethod
    def of(x: Tensor) -> Tensor:
        return x.double().square_().sum(1).float()

    @staticmethod
    def blind(total: Tensor) -> Tensor:
        return torch.ones_like(total)


class Gram(Stat):
    """G = X^T X, [groups, in, in] fp32."""

    name = "gram"
    wants = 2.0

    @staticmethod
    def of(x: Tensor) -> Tensor:
        return x.transpose(1, 2) @ x

    @staticmethod
    def blind(total: Tensor) -> Tensor:
        return torch.eye(len(total), dtype=total.dtype, device=total.device)


class SharingError(Exception):
    """Two sites that shared their input in one run did not in another; collect again without sharing."""


class _Tally:
    """The statistics of one site, or a reference to the site whose input it shares."""

    def __init__(self, needs: Iterable[str]) -> None:
        self.stats = {need: Stat.known[need]() for need in needs}
        self.counts: Tensor | None = None
        self.calls = 0
        self.leader: _Tally | None = None

    def count(self, tokens: list[int]) -> None:
        more = torch.tensor(tokens)
        self.counts = more if self.counts is None else self.counts + more


class Collector:
    """Hooks on modules that fill the statistics of their sites while the model runs.

    Modules that are called with the very same tensor (query, key and value; gate and up) share one accumulator.

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
        by_module: dict[int, list[Site]] = {}
        for site in sites:
            by_module.setdefault(id(site.module), []).append(site)
        self.tallies = {site.name: _Tally(needs) for those in by_module.values() for site in those}
        self.seen: dict[int, tuple[Tensor, _Tally]] = {}
        self.handles = [
            those[0].module.register_forward_pre_hook(self._hook(those), with_kwargs=True)
            for those in by_module.values()
        ]

    def _hook(self, sites: Sequence[Site]) -> Callable[[nn.Module, Any, Any], None]:
        kind = sites[0].adapter
        by_parameter = {site.parameter: site for site in sites}

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(args, kwargs, self.visible)
            source = kind.source(module, call)
            if source is not None and self._led(self.tallies[sites[0].name], source, sites[0].name):
                return
            for parameter, x in kind.inputs(module, call, tuple(by_parameter)):
                if parameter in by_parameter:
                    self._count(by_parameter[parameter], x)

        return hook

    def _led(self, tally: _Tally, x: Tensor, name: str) -> bool:
        """Whether another site counts this very tensor already."""
        tally.calls += 1
        shared = self.seen.get(id(x))
        leader = shared[1] if shared is not None and self.share else None
        if leader is tally:
            leader = None
        if tally.calls > 1 and leader is not tally.leader:
            raise SharingError(name)
        tally.leader = leader
        if leader is None:
            self.seen.setdefault(id(x), (x, tally))  # holds x, so that its id is not given away during the run
        return leader is not None

    def _count(self, site: Site, x: Inputs) -> None:
        parts = [x] if isinstance(x, Tensor) else x
        lengths = [len(part) for part in parts] if isinstance(x, list) else [x.shape[1]] * len(x)
        if not any(lengths):
            return
        parts = [part.float() for part in parts]
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise ZeroskipError(
                f"{site.label}: its calibration input holds NaN or Inf; check the data and the model's dtype"
            )
        tally = self.tallies[site.name]
        tally.count(lengths)
        for stat in tally.stats.values():
            stat.update(parts if isinstance(x, list) else parts[0])

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

        "tokens" is among them: [groups] how many each group saw. One row of a statistic may stand for all groups.

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
        if tally.counts is None:
            return 0, {}
        totals = {name: stat.total for name, stat in tally.stats.items() if stat.total is not None}
        for name, total in totals.items():
            if not bool(torch.isfinite(total).all()):
                raise ZeroskipError(
                    f"{site.label}: the statistic {name!r} of its inputs overflows float32; scale the data"
                )
        return int(tally.counts.max()), totals | {"tokens": tally.counts}

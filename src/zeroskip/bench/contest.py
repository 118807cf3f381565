"""One case: everything that can compute it, checked, raced in turns, and written down as rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from zeroskip.bench.check import Checker, stored
from zeroskip.bench.peers.base import Mode
from zeroskip.bench.peers.remote import PeerError, PeerProcess, WorkClock
from zeroskip.bench.results import Role, Row, Spread
from zeroskip.bench.roofline import Roofline
from zeroskip.bench.suites import Case
from zeroskip.bench.timer import Race, clear, race
from zeroskip.bench.turns import Turns
from zeroskip.planning.candidates import DENSE_FORMATS, PRECISIONS, Call, Layout, layouts
from zeroskip.planning.machine import available_memory_bytes
from zeroskip.planning.measure import bound, runner_name

__all__ = ["Contest", "Entry"]

FEW_TOKENS = 8
FREE = "unstructured"
BATCH_S, RATE = 0.04, 40e9  # a batch lasts no longer than about this, if it computes at this rate
ROUNDS, LEAST_ROUNDS = 9, 5  # so many, unless they take LONGEST times longer than asked
LONGEST = 3.0
MEMORY_SHARE = 0.4  # of what is free, for all copies together
BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
Calls = dict[str, list[Callable[[], object]]]


@dataclass
class Entry:
    """One layout in a race: ours, a rival's or a peer's."""

    layout: str
    role: Role
    format: str
    values: str
    dense: bool
    nbytes: int = 0
    runners: dict[str, str] = field(default_factory=dict)  # runner: kernel
    problem: str | None = None


class Contest:
    """Everything that can compute one case.

    Parameters
    ----------
    case : Case
    formats : tuple of str
        Ours that take part; empty: all.
    cold_bytes, race_s : as in `Settings`
    peers : {name: PeerProcess}
    values : str, optional
        Only layouts of these values take part, and modes of peers that store a weight in as many bits.
    """

    def __init__(
        self,
        case: Case,
        formats: Collection[str],
        cold_bytes: int,
        race_s: float,
        peers: Mapping[str, PeerProcess],
        values: str | None = None,
    ) -> None:
        self.case, self.race_s, self.peers, self.values = case, race_s, peers, values
        self.weight = case.weight()
        self.nonzeros = int(torch.count_nonzero(self.weight))
        self.layouts = self._layouts(formats)
        runners = sum(len(layout.kernels) for layout in self.layouts)
        self.cold_bytes = min(cold_bytes, int(available_memory_bytes() * MEMORY_SHARE / max(runners, 1)))
        self.calls = {
            runner_name(layout, kernel): layout.copies(kernel, self._copies(layout.nbytes))
            for layout in self.layouts
            for kernel in layout.kernels
        }
        self.checker = Checker()
        self.stored = {layout.label: stored(layout, self.weight) for layout in self.layouts}

    def close(self) -> None:
        """Drop the weights, here and in the peers' processes."""
        self.calls.clear()
        for process in self.peers.values():
            try:
                process.forget()
            except PeerError:
                process.close()

    def rows(self, tokens: int, limits: Roofline) -> list[Row]:
        """Race everything at this many tokens with torch's present number of threads."""
        x = self.case.activations(tokens)
        turns, clock = Turns(), WorkClock()
        entries, runners = self._ours(x, clock)
        with torch.inference_mode():
            for entry, process, mode in self._theirs():
                self._load(entry, process, mode, x, runners, clock)
                entries.append(entry)
            seen = self._race(entries, runners, turns, clock)
        return [self._row(entry, entries, seen, tokens, limits) for entry in entries]

    def _layouts(self, formats: Collection[str]) -> list[Layout]:
        module = nn.Linear(self.case.k, self.case.m, bias=False, device="meta")
        module.weight = nn.Parameter(self.weight, requires_grad=False)
        with torch.no_grad():
            kinds = PRECISIONS if self.values is None else (self.values,)
            found, _ = layouts(module, self.weight, None, kinds, FEW_TOKENS)
        wanted = [
            layout
            for layout in found
            if layout.values in kinds
            and (not formats or layout.pattern is None or layout.format in (*formats, *DENSE_FORMATS))
        ]
        # Formats for a pattern stand for it; those that take any zeros are measured where the zeros are free, also
        # where these happen to leave whole columns empty, so that a wide pattern holds them.
        own = [layout for layout in wanted if not layout.dense and layout.pattern != FREE]
        if self.case.zeros.pattern == FREE:
            return wanted
        return [layout for layout in wanted if layout.dense or not own or layout in own]

    def _copies(self, nbytes: int) -> int:
        in_the_model = max(1, self.case.parameters // (self.case.m * self.case.k))
        return min(in_the_model, max(1, math.ceil(self.cold_bytes / max(nbytes, 1))))

    def _batch(self, copies: int, x: Tensor) -> int:
        """Return how many multiplications make one sample: as many as there are copies, unless that takes long.

        The same number for ours and for a peer's: a sample of fewer would miss more of the machine's interruptions.
        """
        if x.shape[0] <= FEW_TOKENS:
            return copies
        return min(copies, max(1, int(BATCH_S * RATE / (2.0 * self.weight.numel() * x.shape[0]))))

    def _ours(self, x: Tensor, clock: WorkClock) -> tuple[list[Entry], Calls]:
        entries, runners = [], Calls()
        for layout in self.layouts:
            role: Role = "rival" if layout.pattern is None else "ours"
            entry = Entry(layout.label, role, layout.format, layout.values, layout.dense, layout.nbytes)
            for kernel in layout.kernels:
                name = runner_name(layout, kernel)
                calls: list[Call] = self.calls[name]
                with torch.inference_mode():
                    problem = self.checker.ours(calls[0], x, self.stored[layout.label])
                if problem is None:
                    entry.runners[name] = kernel
                    # The next batch goes on with the next copies.
                    runners[name] = [batch([bound(call, x) for call in calls], self._batch(len(calls), x), clock)]
                else:
                    entry.problem = f"{kernel} {problem}"
            entries.append(entry)
        return entries, runners

    def _theirs(self) -> list[tuple[Entry, PeerProcess, Mode]]:
        return [
            (Entry(f"{name} {mode.name}", "peer", name, mode.name, False), process, mode)
            for name, process in self.peers.items()
            for mode in process.peer.modes
            if not self.values or mode.bits == BITS[self.values]
        ]

    def _load(
        self, entry: Entry, process: PeerProcess, mode: Mode, x: Tensor, runners: Calls, clock: WorkClock
    ) -> None:
        """Load the weight into a peer, check its answer, and enter it in the race."""
        tokens = x.shape[0]
        copies = self._batch(self._copies(self.weight.numel() * mode.bits // 8), x)
        try:
            entry.nbytes, stands = process.load(mode.name, self.weight, copies, torch.get_num_threads(), tokens)
            entry.problem = self.checker.theirs(process.check(mode.name, x), x, stands, mode)
        except PeerError as error:
            entry.problem = str(error)
        if entry.problem is None:
            entry.runners[entry.layout] = ""
            runners[entry.layout] = [partial(process.timed, mode.name, clock)]

    def _race(self, entries: list[Entry], runners: Calls, turns: Turns, clock: WorkClock) -> Race:
        """Race them; a peer that fails on the way is taken out, and the others start again."""
        start = time.monotonic()

        def settled(seen: Race) -> bool:  # the race's own clock does not count whole batches
            spent = time.monotonic() - start
            return spent > LONGEST * self.race_s or (seen.rounds >= ROUNDS and (spent > self.race_s or clear(seen)))

        while runners:
            owners = {name: entry for entry in entries for name in entry.runners}
            prepare = {name: turns.of(entry.format if entry.role == "peer" else "") for name, entry in owners.items()}
            core = [name for name, entry in owners.items() if entry.dense]
            try:
                return race(
                    runners,
                    budget_s=self.race_s,
                    least_s=0.0,
                    min_rounds=LEAST_ROUNDS,
                    settled=settled,
                    core=core,
                    prepare=prepare,
                    clock=clock,
                )
            except PeerError as error:
                for name, entry in owners.items():
                    if entry.role == "peer" and str(error).startswith(f"{entry.format}:"):
                        entry.problem = str(error)
                        entry.runners.clear()
                        del runners[name]
        return Race({})

    def _row(self, entry: Entry, entries: list[Entry], seen: Race, tokens: int, limits: Roofline) -> Row:
        case = self.case
        names = [name for name in entry.runners if name in seen.samples]
        about = (
            str(case), case.model, case.m, case.k, case.zeros.pattern, 1.0 - self.nonzeros / (case.m * case.k), tokens,
            limits.threads, entry.role, entry.layout, entry.format, entry.values, entry.dense,
        )  # fmt: skip
        if not names:
            return Row(*about, "", entry.nbytes, problem=entry.problem)
        best = seen.fastest(names)
        seconds = seen.median(best)
        dense_gflops = 2e-9 * tokens * case.m * case.k / seconds
        gflops = 2e-9 * tokens * self.nonzeros / seconds
        counted = dense_gflops if entry.dense else gflops
        return Row(
            *about,
            entry.runners[best],
            entry.nbytes,
            seconds * 1e3,
            gflops,
            dense_gflops,
            None if entry.role == "peer" else 100 * counted / limits.peak(entry.values),
            100 * entry.nbytes / seconds / 1e9 / limits.memory_gb_per_s,
            _ratios(best, entry, entries, seen) if entry.role == "ours" else {},
            entry.problem,
        )


def batch(calls: list[Callable[[], object]], count: int, clock: WorkClock) -> Callable[[], object]:
    """Return a call that makes the next `count` of `calls` in rotation, and by `clock` takes as long as one of them."""
    at = 0

    def run() -> None:
        nonlocal at
        chosen = [calls[(at + i) % len(calls)] for i in range(count)]
        at += count
        start = time.perf_counter()
        for call in chosen:
            call()
        clock.replace(start, (time.perf_counter() - start) / count)

    return run


def _ratios(mine: str, entry: Entry, entries: list[Entry], seen: Race) -> dict[str, Spread]:
    """How many times faster than every dense layout and every peer, and than the best dense one as precise."""
    found: dict[str, Spread] = {}
    timed = {other.layout: seen.fastest(list(other.runners)) for other in entries if other.runners}
    for other in entries:
        if other is not entry and other.layout in timed and (other.dense or other.role != "ours"):
            found[other.layout] = paired(seen, timed[other.layout], mine)
    allowed = PRECISIONS[: PRECISIONS.index(entry.values) + 1]
    dense = [timed[o.layout] for o in entries if o.dense and o.values in allowed and o.layout in timed]
    if dense:
        found["best dense"] = paired(seen, seen.fastest(dense), mine)
    return found


def paired(seen: Race, over: str, under: str) -> Spread:
    """Return time(over) / time(under): the median over the rounds that both ran in, and the quarters around it."""
    a, b = (np.asarray(seen.samples[name]) for name in (over, under))
    shared = min(len(a), len(b))
    low, value, high = np.quantile(a[:shared] / b[:shared], (0.25, 0.5, 0.75))
    return Spread(float(value), float(low), float(high))

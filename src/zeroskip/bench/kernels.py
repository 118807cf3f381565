"""A table of kernels: each checked against the float64 oracle, then raced against dense rivals and peers, weights cold.

Between two uses of one copy of a weight, a runner's other copies alone cover what the model touches in one step (or
`cold_bytes`, if that is less). Peers are timed in their own processes, in turns with ours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch

from zeroskip.bench import peers
from zeroskip.bench.contest import Contest
from zeroskip.bench.peers.environments import missing
from zeroskip.bench.peers.remote import PeerError, PeerProcess
from zeroskip.bench.results import KernelTable
from zeroskip.bench.roofline import rooflines
from zeroskip.bench.suites import Case, suite
from zeroskip.errors import ZeroskipError, expect_seconds, suggest
from zeroskip.formats import names as format_names
from zeroskip.planning.machine import this_machine

__all__ = ["Settings", "bench_kernels"]

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """What to benchmark, and how thoroughly.

    Attributes
    ----------
    suite : str
    threads : tuple of int
    tokens : tuple of int
        Empty: the suite's own.
    peers : tuple of str
    formats : tuple of str
        Our formats that take part; empty: all. `dense` always does.
    cold_bytes : int
        No runner's copies need to cover more.
    race_s : float
        Seconds after which a race ends, once it has its least number of rounds.
    minutes : float or None
        No race is begun after these; the cases that are not complete are named as left out.
    quick : bool
        The suite's first two cases, and its first and last but one token count.
    """

    suite: str = "llm"
    threads: tuple[int, ...] = (1,)
    tokens: tuple[int, ...] = ()
    peers: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    cold_bytes: int = 256 << 20
    race_s: float = 2.0
    minutes: float | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in format_names():
                raise ZeroskipError(f"unknown format {name!r}{suggest(name, format_names())}")
        for name in self.peers:
            if name not in peers.names():
                raise ZeroskipError(f"unknown peer {name!r}{suggest(name, peers.names())}")
        for what, counts in (("threads", self.threads), ("tokens", self.tokens)):
            if any(count < 1 for count in counts):
                raise ZeroskipError(f"{what} {counts}: each is at least 1")
        if not self.threads:
            raise ZeroskipError("no thread counts: give at least one, such as 1")
        expect_seconds("race_s", self.race_s)
        if self.minutes is not None and not self.minutes >= 0:
            raise ZeroskipError(f"the budget is {self.minutes} minutes: give 0 or more")
        if self.cold_bytes < 0:
            raise ZeroskipError(f"cold_bytes is {self.cold_bytes}: give 0 or more")

    def cases(self) -> tuple[Case, ...]:
        cases = suite(self.suite).cases
        return cases[:2] if self.quick else cases

    def token_counts(self) -> tuple[int, ...]:
        counts = self.tokens or suite(self.suite).tokens
        return tuple(sorted({counts[0], counts[-1]} if self.quick else set(counts)))


def bench_kernels(
    settings: Settings,
    progress: Progress = lambda done, total, name: None,
    known: KernelTable | None = None,
    keep: Callable[[KernelTable], None] = lambda found: None,
) -> KernelTable:
    """Run a benchmark.

    Parameters
    ----------
    settings : Settings
    progress : callable
        Told (cases done, cases in all, what comes next).
    known : KernelTable, optional
        What an earlier run found: its races are not run again.
    keep : callable
        Given the table after each race, so that a run that is stopped can go on later.

    Raises
    ------
    ZeroskipError
        On an unknown suite, or if `known` is of another suite, machine, formats, peers or `cold_bytes`.
    """
    cases, before = settings.cases(), torch.get_num_threads()
    until = None if settings.minutes is None else time.monotonic() + 60 * settings.minutes
    found = KernelTable(settings.suite, str(this_machine()), asdict(settings) | {"tokens": settings.token_counts()})
    if known is not None:
        _same(known, found)
        found.rooflines, found.rows = list(known.rooflines), list(known.rows)
    try:
        with ExitStack() as stack:
            running = dict(_start(settings.peers, stack, found))
            progress(0, len(cases), "the limits of this machine")
            measured = {one.threads for one in found.rooflines}
            wanted = [threads for threads in settings.threads if threads not in measured]
            found.rooflines += rooflines(wanted, 0.1 if settings.quick else 0.3)
            found.left_out = [str(case) for case in cases if _races(case, settings, found)]
            for done, case in enumerate(cases):
                races = _races(case, settings, found)
                if not races:
                    continue
                if until is not None and time.monotonic() > until:
                    break
                contest = Contest(case, settings.formats, settings.cold_bytes, settings.race_s, running)
                for threads, tokens in races:
                    if until is not None and time.monotonic() > until:
                        break
                    torch.set_num_threads(threads)
                    progress(done, len(cases), f"{case}, {tokens} tokens, {threads} threads")
                    found.rows += contest.rows(tokens, found.roofline(threads))
                    if not _races(case, settings, found):
                        found.left_out.remove(str(case))
                    keep(found)
                contest.close()
    finally:
        torch.set_num_threads(before)
    progress(len(cases), len(cases), "")
    return found


def _races(case: Case, settings: Settings, found: KernelTable) -> list[tuple[int, int]]:
    """Return the (threads, tokens) that are asked for and not in the table."""
    there = {(row.threads, row.tokens) for row in found.rows if row.case == str(case)}
    asked = ((threads, tokens) for threads in settings.threads for tokens in settings.token_counts())
    return [pair for pair in asked if pair not in there]


def _same(known: KernelTable, found: KernelTable) -> None:
    """Refuse to add to a table whose rows would not be comparable."""
    names = ("formats", "peers", "cold_bytes")
    before = {"suite": known.suite, "machine": known.machine} | {name: known.settings.get(name) for name in names}
    after = {"suite": found.suite, "machine": found.machine} | {name: found.settings[name] for name in names}
    for name, value in after.items():
        there = before[name]
        if (tuple(there) if isinstance(there, list) else there) != value:
            raise ZeroskipError(
                f"cannot go on with a benchmark whose {name} is {there!r}, here {value!r}: begin a new one"
            )


def _start(asked: Sequence[str], stack: ExitStack, found: KernelTable) -> Iterator[tuple[str, PeerProcess]]:
    """Start the workers of the peers that are there; write down who takes part and who does not."""
    for name in asked:
        reason = missing(name)
        try:
            if reason is None:
                process = stack.enter_context(PeerProcess(name))
                found.peers[name] = process.version()
                yield name, process
                continue
        except (PeerError, OSError) as error:
            reason = str(error)
        log.warning("peer %s does not take part: %s", name, reason)
        found.peers[name] = str(reason)
        found.missing.append(name)

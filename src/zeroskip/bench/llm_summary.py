"""What a benchmark of language models comes to: each of ours against the best rival of a kind, and against itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zeroskip.bench.peers.llama_model import PLAIN
from zeroskip.bench.timer import Ratio
from zeroskip.planning.report import table

if TYPE_CHECKING:
    from zeroskip.bench.llm_results import Contender, Timing

__all__ = ["Line", "bits_of", "summary", "summary_table"]

KINDS = {"best 4-bit": 4, "best 8-bit": 8}


@dataclass(frozen=True)
class Line:
    """One comparison.

    Attributes
    ----------
    what : str
        ``'decode, 4 sequences'``, ``'first token after 128'``, ``'weights'`` or ``'16 sequences over 1'``.
    ours, against, rival : str
        A recipe; the kind of rival; which one that was.
    threads : int
        0 for weights.
    ratio : Ratio
        How many times as fast; of weights how many of its bytes, which have no interval.
    """

    what: str
    ours: str
    against: str
    rival: str
    threads: int
    ratio: Ratio


def bits_of(name: str) -> int:
    """Return the bits of a mode of a peer that runs whole models, by its name: 4 of ``'q4_k_m plain'``."""
    found = re.search(r"\d+", name)
    return int(found.group()) if found else 0


def summary(contenders: Sequence[Contender], times: Sequence[Timing]) -> list[Line]:
    """Return all comparisons that the figures allow.

    "Best" is the rival of so many bits with the least median in that race; torch's dense models take no part.
    """
    ours = [one for one in contenders if one.role == "ours" and one.problem is None]
    theirs = [one for one in contenders if one.role == "rival" and not one.name.startswith("torch ")]
    lines = [line for one in ours for line in _speeds(one.name, theirs, times)]
    for one in ours:
        lines += _growth(one.name, times)
        lines += [
            Line("weights", one.name, "bytes", each.name, 0, Ratio(*3 * (one.memory_bytes / each.memory_bytes,)))
            for each in theirs
            if each.memory_bytes and not each.name.endswith(PLAIN)
        ]
    return lines


def summary_table(lines: Sequence[Line]) -> list[str]:
    """Return the lines of a table."""
    rows = []
    for line in lines:
        ratio, exact = line.ratio, line.ratio.low == line.ratio.high
        x = f"{ratio.value:.3f}" if exact else f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"
        rows.append([line.what, str(line.threads or "-"), line.ours, line.against, line.rival, x])
    return table(["what", "threads", "ours", "against", "which is", "x"], rows)


def _speeds(name: str, theirs: Sequence[Contender], times: Sequence[Timing]) -> Iterator[Line]:
    for mine in (each for each in times if each.contender == name):
        what = f"decode, {mine.batch} sequences" if mine.what == "decode" else f"first token after {mine.tokens}"
        race = {each.contender: each.ms for each in times if _same(each, mine)}
        kinds = KINDS if mine.what == "decode" else {"best": None}
        for kind, bits in kinds.items():
            there = [each.name for each in theirs if each.name in race and bits in (None, bits_of(each.dtype))]
            if there:
                best = min(there, key=lambda each: race[each])
                yield Line(what, name, kind, best, mine.threads, mine.faster_than[best])


def _growth(name: str, times: Sequence[Timing]) -> Iterator[Line]:
    """Tokens a second of the most sequences over those of one."""
    mine = [each for each in times if each.contender == name and each.what == "decode"]
    for threads in dict.fromkeys(each.threads for each in mine):
        speeds = {each.batch: each.tokens_a_second for each in mine if each.threads == threads}
        most = max(speeds)
        if 1 in speeds and most > 1:
            ratio = speeds[most] / speeds[1]
            yield Line(f"{most} sequences over 1", name, "itself", name, threads, Ratio(ratio, ratio, ratio))


def _same(one: Timing, other: Timing) -> bool:
    return all(getattr(one, key) == getattr(other, key) for key in ("what", "tokens", "batch", "threads"))

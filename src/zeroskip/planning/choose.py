"""The choice rule: from measured times to one layout a site and one kernel a token bucket.

A sparse layout is eligible only if at every listed token count it reaches 0.98x the fastest dense candidate, and it
is chosen if it then beats the fastest dense layout on the weighted time by more than the noise. Otherwise the fastest
dense layout is installed; the layer as it stands keeps its place unless another dense one beats it by more than the
noise and is nowhere slower (below 0.98x), for the promise is to be never slower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from zeroskip.bench.dense import rivals
from zeroskip.bench.timer import Floats, Race, Ratio, interval
from zeroskip.planning.measure import Measured
from zeroskip.planning.tokens import Tokens

__all__ = ["Choice", "buckets", "choose"]

ELIGIBLE = 0.98


def buckets(kernels: Mapping[int, str]) -> list[tuple[int | None, str]]:
    """Return [(most tokens, kernel)] for the kernel chosen at each count; boundaries are geometric means.

    The last bucket is open (None); neighbours with the same kernel are one bucket.

    Examples
    --------
    >>> buckets({1: "gemv", 32: "gemm", 512: "gemm"})
    [(5, 'gemv'), (None, 'gemm')]
    """
    counts = sorted(kernels)
    table: list[tuple[int | None, str]] = []
    for here, after in zip(counts, [*counts[1:], None], strict=True):
        if after is not None and kernels[here] == kernels[after]:
            continue
        table.append((None if after is None else math.isqrt(here * after), kernels[here]))
    return table


@dataclass(frozen=True)
class Choice:
    """What is installed at a site, and why.

    `ratios` holds, for every layout, how many times faster than the fastest dense candidate it is at each count;
    `gain` its weighted ratio to the fastest dense layout.
    """

    label: str
    kernels: dict[int, str]
    reason: str
    ratios: dict[str, dict[int, float]]
    gain: Ratio | None

    @property
    def buckets(self) -> list[tuple[int | None, str]]:
        return buckets(self.kernels)


@dataclass
class _Entry:
    """One layout, with its best kernel at each count."""

    label: str
    dense: bool
    kernels: dict[int, str]
    times: dict[int, float]
    draws: dict[int, Floats]


def choose(measured: Measured, tokens: Tokens) -> Choice:
    """Apply the choice rule of this file to one site's measurements."""
    entries = [entry for entry in (_entry(measured, layout.label, tokens) for layout in measured.layouts) if entry]
    dense = [entry for entry in entries if entry.dense]
    best = {t: min(entry.times[t] for entry in dense) for t in tokens.counts}
    scale = tokens.weights or tuple(1.0 / best[t] for t in tokens.counts)
    weight = dict(zip(tokens.counts, scale, strict=True))
    ratios = {entry.label: {t: best[t] / entry.times[t] for t in tokens.counts} for entry in entries}

    fastest = min(dense, key=lambda entry: _total(entry, weight))
    as_is = dense[0]
    better = [entry for entry in dense if all(as_is.times[t] / entry.times[t] >= ELIGIBLE for t in tokens.counts)]
    fallback = min(better, key=lambda entry: _total(entry, weight))
    if fallback is not as_is and _gain(as_is, fallback, weight).low <= 1.0:
        fallback = as_is

    sparse = sorted((entry for entry in entries if not entry.dense), key=lambda entry: _total(entry, weight))
    eligible = [entry for entry in sparse if min(ratios[entry.label].values()) >= ELIGIBLE]
    for entry in eligible:
        gain = _gain(fastest, entry, weight)
        if gain.low > 1.0:
            return Choice(entry.label, entry.kernels, _won(entry, ratios, gain), ratios, gain)
    reason = _lost(as_is, fallback, fastest, sparse, eligible, ratios, weight, measured)
    return Choice(fallback.label, fallback.kernels, reason, ratios, None)


def _entry(measured: Measured, label: str, tokens: Tokens) -> _Entry | None:
    """Return the layout with its best kernels, None if at some count none of them gave a right answer."""
    kernels: dict[int, str] = {}
    times: dict[int, float] = {}
    draws: dict[int, Floats] = {}
    for t in tokens.counts:
        result: Race = measured.races[t]
        names = measured.runners(label, t)
        if not names:
            return None
        name = result.fastest(names)
        kernels[t], times[t], draws[t] = name.rpartition("/")[2], result.median(name), result.draws(name, seed=t)
    return _Entry(label, measured.layout(label).dense, kernels, times, draws)


def _total(entry: _Entry, weight: Mapping[int, float]) -> float:
    return sum(entry.times[t] * weight[t] for t in weight)


def _gain(over: _Entry, under: _Entry, weight: Mapping[int, float]) -> Ratio:
    drawn_over = np.sum([over.draws[t] * weight[t] for t in weight], axis=0)
    drawn_under = np.sum([under.draws[t] * weight[t] for t in weight], axis=0)
    return interval(_total(over, weight) / _total(under, weight), drawn_over / drawn_under)


def _won(entry: _Entry, ratios: Mapping[str, Mapping[int, float]], gain: Ratio) -> str:
    each = ", ".join(f"{ratio:.2f}x at {t}" for t, ratio in ratios[entry.label].items())
    over_all = f"{gain.value:.2f}x the fastest dense layout ({gain.low:.2f}-{gain.high:.2f})"
    return f"{entry.label}: {over_all}; against the fastest dense at each token count {each}"


def _lost(
    as_is: _Entry,
    fallback: _Entry,
    fastest: _Entry,
    sparse: list[_Entry],
    eligible: list[_Entry],
    ratios: Mapping[str, Mapping[int, float]],
    weight: Mapping[int, float],
    measured: Measured,
) -> str:
    if fallback is fastest:
        head = f"dense: {fallback.label} is fastest"
    elif slower := [t for t in weight if as_is.times[t] / fastest.times[t] < ELIGIBLE]:
        worst = min(slower, key=lambda t: as_is.times[t] / fastest.times[t])
        head = f"dense: {fallback.label}; {fastest.label} is faster over all but not at {_count(worst)}"
    else:
        head = f"dense: {fallback.label} stays, {fastest.label} is not faster by more than the noise"
    if not sparse:
        refusals = {r for label, r in measured.refused.items() if label.split()[0] not in rivals()}
        wrong = "; a sparse kernel gave wrong results" if measured.wrong else ""
        return f"{head}; no sparse format holds this weight" + (f" ({sorted(refusals)[0]})" if refusals else "") + wrong
    if eligible:
        near = eligible[0]
        gain = _gain(fastest, near, weight)
        return f"{head}; {near.label} {gain.value:.2f}x ({gain.low:.2f}-{gain.high:.2f}), within the noise"
    near = max(sparse, key=lambda entry: min(ratios[entry.label].values()))
    worst = min(ratios[near.label], key=lambda t: ratios[near.label][t])
    return f"{head}; {near.label} {ratios[near.label][worst]:.2f}x at {_count(worst)}"


def _count(tokens: int) -> str:
    return f"{tokens} token" + "s" * (tokens != 1)

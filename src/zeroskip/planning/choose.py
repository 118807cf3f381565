"""The choice rule: from measured times to one layout a site and one kernel a token bucket.

A sparse layout is eligible only if at every listed token count it reaches 0.98x the fastest dense candidate, and it
is chosen if it then beats the fastest dense layout on the weighted time by more than the noise. Of sparse layouts that
are as fast within 2 % the smallest is taken: fewer bytes are worth that. Otherwise the fastest dense layout is
installed; the layer as it stands keeps its place unless another dense one beats it by more than the noise and is
nowhere slower (below 0.98x), for the promise is to be never slower.

Who asks for few bytes gets the smallest layout, dense or sparse, that is nowhere slower than the layer as it stands;
what the fastest one would have gained is named.

In a batch-invariant plan only layouts of ours compete, each with one kernel for every token count that gives a row the
same bits in every batch; "the fastest dense" is then the fastest of these. What would have been faster is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from zeroskip.bench.dense import rivals
from zeroskip.bench.timer import Floats, Race, Ratio, interval
from zeroskip.errors import ZeroskipError
from zeroskip.planning.measure import Measured
from zeroskip.planning.tokens import Tokens

__all__ = ["Choice", "buckets", "choose"]

ELIGIBLE = 0.98
LEVEL = 0.98  # of the fastest sparse layout: those nearer than that count as as fast, and the smallest is taken


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
    `gain` its weighted ratio to the fastest dense layout. `pinned`: the kernel serves every count, as a batch-invariant
    plan needs it; `passed_over` then holds what would have been faster, and how many times.
    """

    label: str
    kernels: dict[int, str]
    reason: str
    ratios: dict[str, dict[int, float]]
    gain: Ratio | None
    pinned: bool = False
    passed_over: dict[str, float] = field(default_factory=dict)

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


def choose(
    measured: Measured, tokens: Tokens, steady: Mapping[str, Sequence[str]] | None = None, prefer: str = "speed"
) -> Choice:
    """Apply the choice rule of this file to one site's measurements.

    Parameters
    ----------
    measured : Measured
    tokens : Tokens
    steady : {layout: kernels}, optional
        For a batch-invariant plan: the kernels that give a row the same bits in every batch. Nothing else is chosen.
    prefer : "speed" or "bytes"

    Raises
    ------
    ZeroskipError
        If no dense layout has a steady kernel that gave right answers.
    """
    every = [entry for entry in (_entry(measured, layout.label, tokens) for layout in measured.layouts) if entry]
    fastest = {t: min(entry.times[t] for entry in every if entry.dense) for t in tokens.counts}
    scale = tokens.weights or tuple(1.0 / fastest[t] for t in tokens.counts)
    weight = dict(zip(tokens.counts, scale, strict=True))
    decide = _smallest if prefer == "bytes" else _decide
    if steady is None:
        return decide(every, every, measured, weight)
    held = _held(measured, tokens, steady, weight)
    if not any(entry.dense for entry in held):
        raise ZeroskipError("no dense kernel here gives a row the same bits in every batch: leave batch_invariant out")
    choice = decide(held, every, measured, weight)
    chosen = next(entry for entry in held if entry.label == choice.label)
    faster = {
        entry.label: round(_total(chosen, weight) / _total(entry, weight), 4)
        for entry in every
        if all(entry.label != one.label or entry.kernels != one.kernels for one in held)
        and _total(entry, weight) < _total(chosen, weight)
    }
    first = max(faster, key=lambda label: faster[label], default=None)
    cost = "it costs nothing here"
    if first is not None:
        again = ", with a kernel for each count," if first == chosen.label else ""
        cost = f"passed over {first}{again} {faster[first]:.2f}x as fast, whose rows may vary with the batch"
    return replace(choice, reason=f"{choice.reason}; batch-invariant: {cost}", pinned=True, passed_over=faster)


def _decide(entries: list[_Entry], every: list[_Entry], measured: Measured, weight: Mapping[int, float]) -> Choice:
    """Choose among `entries`; the ratios are those of `every` layout."""
    dense = [entry for entry in entries if entry.dense]
    ratios = _ratios(entries, every, weight)
    fastest = min(dense, key=lambda entry: _total(entry, weight))
    as_is = dense[0]
    better = [entry for entry in dense if all(as_is.times[t] / entry.times[t] >= ELIGIBLE for t in weight)]
    fallback = min(better, key=lambda entry: _total(entry, weight))
    if fallback is not as_is and _gain(as_is, fallback, weight).low <= 1.0:
        fallback = as_is

    sparse = sorted((entry for entry in entries if not entry.dense), key=lambda entry: _total(entry, weight))
    eligible = [entry for entry in sparse if min(ratios[entry.label].values()) >= ELIGIBLE]
    winners = [(entry, gain) for entry in eligible if (gain := _gain(fastest, entry, weight)).low > 1.0]
    if winners:
        least = _total(winners[0][0], weight)
        level = [pair for pair in winners if least / _total(pair[0], weight) >= LEVEL]
        entry, gain = min(level, key=lambda pair: measured.layout(pair[0].label).nbytes)
        return Choice(entry.label, entry.kernels, _won(entry, ratios, gain), ratios, gain)
    reason = _lost(as_is, fallback, fastest, sparse, eligible, ratios, weight, measured)
    return Choice(fallback.label, fallback.kernels, reason, ratios, None)


def _smallest(entries: list[_Entry], every: list[_Entry], measured: Measured, weight: Mapping[int, float]) -> Choice:
    """Choose the least bytes of those that are nowhere slower than the layer as it stands; of as many, the faster."""
    as_is = next(entry for entry in entries if entry.dense)
    speed = {entry.label: {t: as_is.times[t] / entry.times[t] for t in weight} for entry in entries}
    fit = [entry for entry in entries if min(speed[entry.label].values()) >= ELIGIBLE]
    size = {entry.label: measured.layout(entry.label).nbytes for entry in entries}
    one = min(fit, key=lambda entry: (size[entry.label], _total(entry, weight)))
    each = ", ".join(f"{ratio:.2f}x at {t}" for t, ratio in speed[one.label].items())
    reason = f"{one.label}: the smallest, {size[one.label] / size[as_is.label]:.2f} of the bytes"
    if one is not as_is:
        reason += f"; against {as_is.label} at each token count {each}"
    fastest = min(fit, key=lambda entry: _total(entry, weight))
    if fastest is not one:
        reason += f"; {fastest.label} would be {_total(one, weight) / _total(fastest, weight):.2f}x as fast"
    return Choice(one.label, one.kernels, reason, _ratios(entries, every, weight), None)


def _ratios(entries: list[_Entry], every: list[_Entry], weight: Mapping[int, float]) -> dict[str, dict[int, float]]:
    """How many times as fast as the fastest dense of `entries` each layout is, at each count."""
    best = {t: min(entry.times[t] for entry in entries if entry.dense) for t in weight}
    return {entry.label: {t: best[t] / entry.times[t] for t in weight} for entry in (*every, *entries)}


def _held(
    measured: Measured, tokens: Tokens, steady: Mapping[str, Sequence[str]], weight: Mapping[int, float]
) -> list[_Entry]:
    """Return each steady layout with the one kernel that is fastest over all counts."""
    found: list[_Entry] = []
    for label, kernels in steady.items():
        each = [entry for kernel in kernels if (entry := _entry(measured, label, tokens, kernel)) is not None]
        if each:
            found.append(min(each, key=lambda entry: _total(entry, weight)))
    return found


def _entry(measured: Measured, label: str, tokens: Tokens, only: str | None = None) -> _Entry | None:
    """Return the layout with its best kernels, None if at some count none of them gave a right answer."""
    kernels: dict[int, str] = {}
    times: dict[int, float] = {}
    draws: dict[int, Floats] = {}
    for t in tokens.counts:
        result: Race = measured.races[t]
        names = [name for name in measured.runners(label, t) if only is None or name == f"{label}/{only}"]
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
        if not wrong and not all(layout.dense for layout in measured.layouts):
            return f"{head}; no sparse layout gives a row the same bits in every batch"
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

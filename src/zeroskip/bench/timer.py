"""Race several callables against each other on a machine that is not quiet.

A single time says nothing on a shared machine, a ratio taken in one run says a lot. So the runners are interleaved:
in every round each runner is timed once, in a new order, on its next copy. A runner that comes with several copies of
its weights finds them cold, because every copy of every runner is used before the same copy comes round again; copies
are counted so that this loop covers the bytes which the whole model touches in one step. The result is a ratio of
medians over the same rounds, with a bootstrap interval of those rounds.

A runner that is far behind retires early, and the race ends when the question is settled or the budget is spent.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from zeroskip.errors import ZeroskipError

__all__ = ["Race", "Ratio", "race"]

Clock = Callable[[], float]
Floats = npt.NDArray[np.float64]

RESAMPLES = 400  # bootstrap draws; the 1 % and 99 % quantiles then rest on four draws each
RETIRE_AT = 2.5  # a runner this many times slower than the leader after WARM_ROUNDS has lost
HOPELESS_AT = 12.0  # one this slow in its very first call is not called again
WARM_ROUNDS = 5
SLOW_ROUNDS = 3  # instead of WARM_ROUNDS where these alone have spent the budget
BELIEVED_S = 0.1  # calls that take this long together say enough about a runner's speed
LEAST_SAMPLE_S = 60e-6  # several calls make one sample until it lasts this long: the clock costs ~0.1 us


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians, with the interval in which it lies at 98 % (bootstrap over rounds)."""

    value: float
    low: float
    high: float

    @property
    def noise(self) -> float:
        """Half the interval's width, relative to the value."""
        return (self.high - self.low) / (2 * self.value)


@dataclass
class Race:
    """The samples of a race: for each runner one time in seconds a round, in order of rounds.

    A runner that retired has fewer samples than the others; it is compared over the rounds it took part in.
    """

    samples: dict[str, list[float]]
    retired: set[str] = field(default_factory=set)
    rounds: int = 0

    @property
    def names(self) -> list[str]:
        return list(self.samples)

    @property
    def running(self) -> list[str]:
        """The runners that have not retired."""
        return [name for name in self.samples if name not in self.retired]

    def median(self, name: str) -> float:
        """Return the runner's median time in seconds."""
        return float(np.median(self.samples[name]))

    def fastest(self, names: Sequence[str] | None = None) -> str:
        """Return the name with the least median."""
        return min(names or self.names, key=self.median)

    def spread(self, name: str) -> float:
        """Return how far apart the quarters of the runner's times lie, relative to the median: the machine's unrest."""
        low, high = np.quantile(self.samples[name], (0.25, 0.75))
        return float(high - low) / self.median(name)

    def draws(self, name: str, seed: int = 0) -> Floats:
        """Return RESAMPLES bootstrap medians in seconds; runners with equally many rounds share their draws."""
        times = np.asarray(self.samples[name])
        chosen = np.random.default_rng(seed).integers(0, len(times), (RESAMPLES, len(times)))
        return np.asarray(np.median(times[chosen], axis=1))

    def ratio(self, over: str, under: str) -> Ratio:
        """Return time(over) / time(under): how many times faster `under` is."""
        shared = min(len(self.samples[over]), len(self.samples[under]))
        pair = Race({name: self.samples[name][:shared] for name in (over, under)})
        drawn = pair.draws(over) / pair.draws(under)
        return interval(pair.median(over) / pair.median(under), drawn)


def interval(value: float, drawn: Floats) -> Ratio:
    """Return the value with the 1 % and 99 % quantiles of its bootstrap draws."""
    low, high = np.quantile(drawn, (0.01, 0.99))
    return Ratio(value, min(value, float(low)), max(value, float(high)))


def race(
    runners: Mapping[str, Sequence[Callable[[], object]]],
    *,
    budget_s: float = 0.5,
    least_s: float = 0.15,
    min_rounds: int = 11,
    max_rounds: int = 300,
    settled: Callable[[Race], bool] | None = None,
    retire: bool = True,
    core: Collection[str] = (),
    prepare: Mapping[str, Callable[[], object]] | None = None,
    known: Mapping[str, float] | None = None,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> Race:
    """Time the runners in turn until the question is settled.

    Parameters
    ----------
    runners : mapping of name to calls
        Each runner's calls do the same work on different copies of its weights; they are used in rotation.
    budget_s : float
        Seconds after which no further round starts, once `min_rounds` are complete; with very slow runners the
        minimum itself is cut to three rounds at four times the budget, and to one beyond sixteen times.
    least_s : float
        Seconds before `settled` is asked, so that a short slow phase of the machine is not all that was seen.
    settled : function of Race to bool, optional
        Asked after `min_rounds` and `least_s`, and then every few rounds; True ends the race. By default
        `clear`: every runner's ratio to the fastest is known within 2 %, or is clearly above 1.
    core : names
        Runners whose ranking among themselves matters even where others beat them all: they retire only when far
        behind the best of these.
    prepare : mapping of name to function, optional
        Called before each of the runner's samples, outside the clock.
    known : mapping of name to seconds, optional
        How long a call of a runner took that has been called already: it is not called again beforehand.
    retire : bool
        Let runners that are far behind drop out. They keep the samples they have.

    Raises
    ------
    ZeroskipError
        If there are no runners or one has no calls.
    """
    if not runners or not all(runners.values()):
        raise ZeroskipError("nothing to time: give at least one runner, and each at least one call")
    settled = settled or clear
    order = np.random.default_rng(seed)
    result = Race({name: [] for name in runners})
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a sample would be charged to one runner
    try:
        bursts = _first_calls(runners, result, retire, prepare or {}, known or {}, clock)
        start, asked = clock(), min_rounds
        while result.rounds < max_rounds:
            _round(runners, result, bursts, prepare or {}, order, clock)
            spent = clock() - start
            if retire and result.rounds >= (WARM_ROUNDS if spent < budget_s else SLOW_ROUNDS):
                _retire(result, core)
            if result.rounds >= _least(min_rounds, spent, budget_s) and spent >= budget_s:
                break
            if result.rounds >= asked and spent >= min(least_s, budget_s):
                if settled(result):
                    break
                asked = result.rounds + max(2, result.rounds // 4)
    finally:
        if collecting:
            gc.enable()
    return result


def clear(result: Race) -> bool:
    """Return whether every running runner's ratio to the fastest is known within 2 % or is clearly above 1."""
    best = result.fastest(result.running)
    ratios = [result.ratio(name, best) for name in result.running if name != best]
    return all(ratio.low > 1.005 or ratio.noise < 0.02 for ratio in ratios)


def _least(min_rounds: int, spent: float, budget_s: float) -> int:
    if spent > 16 * budget_s:
        return 1
    return min(3, min_rounds) if spent > 4 * budget_s else min_rounds


def _first_calls(
    runners: Mapping[str, Sequence[Callable[[], object]]],
    result: Race,
    retire: bool,
    prepare: Mapping[str, Callable[[], object]],
    known: Mapping[str, float],
    clock: Clock,
) -> dict[str, int]:
    """Call every copy once (page faults, handles, lazy set-up), and return how many calls make one sample."""
    rough = {name: known[name] for name in runners if name in known}
    for name, calls in runners.items():
        if name in rough:
            continue
        prepare.get(name, _nothing)()
        for call in calls:
            call()
        times: list[float] = []
        # One slow call may be the machine's fault: five decide, unless they are slow enough to be believed. The first
        # call on a copy does not count: a packed weight is validated there, which reads all of it.
        for index in range(5):
            start = clock()
            calls[index % len(calls)]()
            times.append(max(clock() - start, 1e-9))
            if sum(times) > BELIEVED_S:
                break
        rough[name] = min(times)
    best = min(rough.values())
    bursts: dict[str, int] = {}
    for name, calls in runners.items():
        if retire and rough[name] > HOPELESS_AT * best and rough[name] > 1e-3:
            result.samples[name].append(rough[name])
            result.retired.add(name)
            continue
        bursts[name] = min(len(calls), max(1, round(LEAST_SAMPLE_S / rough[name])))
    return bursts


def _round(
    runners: Mapping[str, Sequence[Callable[[], object]]],
    result: Race,
    bursts: Mapping[str, int],
    prepare: Mapping[str, Callable[[], object]],
    order: np.random.Generator,
    clock: Clock,
) -> None:
    names = result.running
    for place in order.permutation(len(names)):
        name = names[place]
        calls, burst = runners[name], bursts[name]
        first = result.rounds * burst
        batch = [calls[(first + i) % len(calls)] for i in range(burst)]
        prepare.get(name, _nothing)()
        start = clock()
        for call in batch:
            call()
        result.samples[name].append((clock() - start) / burst)
    result.rounds += 1


def _nothing() -> None:
    return None


def _retire(result: Race, core: Collection[str]) -> None:
    running = result.running
    if not running:
        return
    best = result.median(result.fastest(running))
    inner = [name for name in running if name in core]
    best_inner = result.median(result.fastest(inner)) if inner else best
    for name in running:
        if min(result.samples[name]) > RETIRE_AT * (best_inner if name in core else best):
            result.retired.add(name)

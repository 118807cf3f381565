"""The timer under a clock of our own: nothing here depends on how fast the machine is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from zeroskip.bench.timer import HOPELESS_AT, Race, race
from zeroskip.errors import ZeroskipError


class World:
    """A clock that only the calls advance."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def call(self, name: str, seconds: float | Iterator[float]) -> Callable[[], object]:
        def body() -> None:
            self.log.append(name)
            self.now += seconds if isinstance(seconds, float) else next(seconds)

        return body


def test_medians_and_ratio() -> None:
    world = World()
    seen = race({"a": [world.call("a", 3e-3)], "b": [world.call("b", 2e-3)]}, clock=world.clock)
    assert seen.median("a") == pytest.approx(3e-3)
    assert seen.fastest() == "b"
    ratio = seen.ratio("a", "b")
    assert (
        ratio.value == pytest.approx(1.5)
        and ratio.low == pytest.approx(1.5)
        and ratio.noise == pytest.approx(0, abs=1e-9)
    )


def test_every_runner_is_timed_once_a_round_on_its_next_copy() -> None:
    world = World()
    copies = [world.call(f"a{i}", 1e-3) for i in range(3)]
    seen = race({"a": copies, "b": [world.call("b", 1e-3)]}, clock=world.clock, max_rounds=6, settled=lambda _: False)
    assert seen.rounds == 6 and [len(seen.samples[name]) for name in "ab"] == [6, 6]
    timed = [name for name in world.log if name.startswith("a")][-6:]
    assert timed == ["a0", "a1", "a2"] * 2


def test_short_calls_are_timed_several_at_once_on_different_copies() -> None:
    world = World()
    copies = [world.call(f"a{i}", 10e-6) for i in range(8)]
    seen = race({"a": copies}, clock=world.clock, max_rounds=4, settled=lambda _: False)
    assert seen.median("a") == pytest.approx(10e-6)
    assert world.log[-6:] == ["a2", "a3", "a4", "a5", "a6", "a7"]


def test_the_far_behind_retire_but_the_core_is_ranked_among_itself() -> None:
    world = World()
    runners = {
        "sparse": [world.call("sparse", 1e-4)],
        "dense": [world.call("dense", 4e-4)],
        "dense too": [world.call("dense too", 5e-4)],
        "lost": [world.call("lost", 4e-4)],
        "hopeless": [world.call("hopeless", 1e-4 * HOPELESS_AT * 11)],
    }
    seen = race(runners, core=("dense", "dense too"), clock=world.clock, max_rounds=20, settled=lambda _: False)
    assert seen.retired == {"lost", "hopeless"}
    assert len(seen.samples["hopeless"]) == 1 and len(seen.samples["dense too"]) == 20
    assert seen.ratio("lost", "sparse").value == pytest.approx(4.0)


def test_one_hiccup_at_the_start_does_not_retire() -> None:
    world = World()
    times = iter([1e-3, 9e-2, *[1e-3] * 500])
    runners = {"a": [world.call("a", times)], "b": [world.call("b", 1e-3)]}
    seen = race(runners, clock=world.clock, max_rounds=20)
    assert not seen.retired and seen.median("a") == pytest.approx(1e-3)


def test_the_first_call_on_a_copy_does_not_retire() -> None:
    world = World()

    def copy(first: float, later: float) -> Iterator[float]:
        yield first
        while True:
            yield later

    ours = [world.call("ours", copy(2 * HOPELESS_AT * 2e-3, 1e-3)) for _ in range(9)]
    theirs = [world.call("theirs", 2e-3) for _ in range(9)]
    seen = race({"ours": ours, "theirs": theirs}, clock=world.clock)
    assert not seen.retired and seen.fastest() == "ours" and seen.median("ours") == pytest.approx(1e-3)


def test_the_race_ends_when_settled_or_when_the_budget_is_spent() -> None:
    world = World()
    settled = race({"a": [world.call("a", 1e-2)], "b": [world.call("b", 1.5e-2)]}, clock=world.clock, budget_s=100.0)
    assert settled.rounds < 30
    noise = np.random.default_rng(0)
    shaky = (float(t) for t in noise.uniform(1e-3, 1e-1, 10_000))
    seen = race({"a": [world.call("a", shaky)], "b": [world.call("b", 2e-2)]}, clock=world.clock, budget_s=2.0)
    assert 11 <= seen.rounds < 100
    slow = race({"a": [world.call("a", 9.0)], "b": [world.call("b", 9.1)]}, clock=world.clock, budget_s=0.5)
    assert slow.rounds == 1


def test_what_is_known_is_not_called_beforehand() -> None:
    world = World()
    runners = {name: [world.call(name, 2e-5)] for name in "ab"}
    seen = race(runners, known={"a": 2e-5}, clock=world.clock, max_rounds=4, settled=lambda _: False)
    assert world.log[0] == "b" and world.log.count("b") > world.log.count("a") == 4
    assert seen.median("a") == pytest.approx(2e-5)


def test_preparation_is_outside_the_clock() -> None:
    world = World()
    prepare = {"a": world.call("prepare", 1.0)}
    seen = race(
        {"a": [world.call("a", 1e-3)]}, prepare=prepare, clock=world.clock, max_rounds=5, settled=lambda _: True
    )
    assert seen.median("a") == pytest.approx(1e-3)
    assert world.log[-2:] == ["prepare", "a"]


def test_the_interval_holds_the_truth() -> None:
    noise = np.random.default_rng(1)
    hits = 0
    for seed in range(40):
        common = noise.lognormal(0, 0.1, 40)  # what the machine does to a whole round
        a, b = (list(common * speed * noise.lognormal(0, 0.05, 40)) for speed in (1.2, 1.0))
        ratio = Race({"a": a, "b": b}, rounds=40).ratio("a", "b")
        hits += ratio.low <= 1.2 <= ratio.high
        assert ratio.low < ratio.value < ratio.high, seed
    assert hits >= 35


def test_nothing_to_time() -> None:
    for runners in ({}, {"a": []}):
        with pytest.raises(ZeroskipError, match="nothing to time"):
            race(runners)

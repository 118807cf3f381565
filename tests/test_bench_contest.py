"""The race of one case: what a row holds, what may have a time, who takes turns."""

import time

import pytest
from bench_cases import FREE, LIMITS, TINY, two_cases

from zeroskip.bench import contest
from zeroskip.bench.contest import Contest, batch, paired
from zeroskip.bench.kernels import Settings, bench_kernels
from zeroskip.bench.peers.remote import PeerError, WorkClock
from zeroskip.bench.report import markdown, text
from zeroskip.bench.results import Spread
from zeroskip.bench.suites import Case, Zeros
from zeroskip.bench.timer import Race
from zeroskip.bench.turns import Turns


@pytest.fixture
def tiny(monkeypatch):
    two_cases(monkeypatch)


def rows_of(case, tokens=4, peers=None):
    made = Contest(case, (), 1 << 20, 0.01, peers or {})
    found = made.rows(tokens, LIMITS)
    made.close()
    return {row.layout: row for row in found}


def test_a_row_holds_the_arithmetic_of_its_time(tiny):
    rows = rows_of(TINY)
    strip, dense = rows["strip_nm bf16"], rows["dense fp32"]
    assert (
        strip.role == "ours" and rows["linear bf16"].role == "rival" and strip.kernel.startswith("spmm_strip_nm_bf16")
    )
    assert not any(layout.startswith(("bitmask", "csr")) for layout in rows)  # measured where the zeros are free
    seconds = strip.ms / 1e3
    assert strip.gflops == pytest.approx(2e-9 * 4 * 64 * 32 / seconds)
    assert strip.dense_gflops == pytest.approx(2 * strip.gflops)
    assert strip.peak_percent == pytest.approx(strip.gflops) and dense.peak_percent == pytest.approx(dense.dense_gflops)
    assert strip.bandwidth_percent == pytest.approx(100 * strip.nbytes / seconds / 1e10)
    assert {"linear fp32", "linear bf16", "dense bf16", "best dense"} <= set(strip.faster_than)
    assert "best dense" in dense.faster_than and "dense fp32" not in dense.faster_than
    for spread in strip.faster_than.values():
        assert 0 < spread.low <= spread.value <= spread.high


def test_free_zeros_are_for_the_formats_that_take_any(tiny):
    assert {"bitmask fp32", "csr bf16", "dense fp32"} <= set(rows_of(FREE))
    wide = Case("tiny", 64, 64, Zeros("unstructured", 0.95), 64 * 64)  # so few are left that strips may hold them too
    assert {"bitmask fp32", "csr bf16", "dense fp32"} <= set(rows_of(wide))


def test_a_wrong_output_has_no_time(tiny, monkeypatch):
    right = contest.layouts

    def doubled(*asked):
        found, refused_ones = right(*asked)
        for layout in (layout for layout in found if layout.format == "dense"):
            layout.copies = lambda *which, copies=layout.copies: [
                lambda x, call=call: 2 * call(x) for call in copies(*which)
            ]
        return found, refused_ones

    monkeypatch.setattr(contest, "layouts", doubled)
    found = bench_kernels(Settings("llm"))
    wrong = [row for row in found.rows if row.layout.startswith("dense")]
    assert wrong and all(row.ms is None and "times the bound" in row.problem for row in wrong)
    assert not any("dense fp32" in row.faster_than for row in found.rows)
    assert all(row.ms > 0 for row in found.rows if row.role == "rival")
    for shown in (text(found), markdown(found, details=True)):
        lines = [line for line in shown.splitlines() if line.lstrip("| ").startswith("dense fp32")]
        assert lines and all("none" in line and "times the bound" in line for line in lines)


class FakePeer:
    """Stands for the process of `torch_csr`."""

    def __init__(self, scale=1.0, fails=False):
        from zeroskip.bench.peers import get

        self.peer, self.scale, self.fails, self.copies = get("torch_csr"), scale, fails, []

    def load(self, mode, weight, copies, threads, tokens):
        self.weight = weight
        self.copies.append(copies)
        return 1000, weight

    def check(self, mode, x):
        return self.scale * (x @ self.weight.t())

    def timed(self, mode, clock):
        if self.fails:
            raise PeerError("torch_csr: gone")
        clock.replace(time.perf_counter(), 1e-2)

    def forget(self):
        pass


def test_a_peer_has_a_row_and_everybody_a_ratio_to_it(tiny):
    rows = rows_of(TINY, peers={"torch_csr": FakePeer()})
    peer = rows["torch_csr fp32"]
    assert peer.role == "peer" and peer.ms == pytest.approx(10.0, rel=0.5) and peer.peak_percent is None
    assert rows["dense fp32"].faster_than["torch_csr fp32"].value > 1


@pytest.mark.parametrize(
    ("peer", "problem"), [(FakePeer(scale=2.0), "times the bound"), (FakePeer(fails=True), "gone")]
)
def test_a_peer_that_is_wrong_or_fails_has_no_time_and_stops_nobody(tiny, peer, problem):
    rows = rows_of(TINY, peers={"torch_csr": peer})
    assert rows["torch_csr fp32"].ms is None and problem in rows["torch_csr fp32"].problem
    assert rows["dense fp32"].ms > 0 and "torch_csr fp32" not in rows["dense fp32"].faster_than


def test_copies_cover_the_model_but_no_more(tiny):
    made = Contest(TINY, (), 1 << 30, 0.01, {})
    assert all(len(calls) == 3 for calls in made.calls.values())  # the model has three layers of this shape
    assert all(len(calls) == 1 for calls in Contest(TINY, (), 0, 0.01, {}).calls.values())


def test_a_batch_takes_turns_and_counts_as_one():
    used = []
    clock = WorkClock()
    run = batch([lambda i=i: used.append(i) for i in range(3)], 2, clock)
    run()
    run()
    assert used == [0, 1, 2, 0]


def test_nobody_is_timed_right_after_another_process():
    slept = []
    turns = Turns(slept.append)
    ours, theirs = turns.of(""), turns.of("mkl")
    for prepare in (ours, ours, theirs, theirs, ours):
        prepare()
    assert len(slept) == 2


def test_ratios_are_paired_by_round():
    seen = Race({"a": [1.0, 20.0, 3.0], "b": [0.5, 10.0, 1.5, 99.0]}, rounds=4)
    assert paired(seen, "a", "b") == Spread(2.0, 2.0, 2.0)

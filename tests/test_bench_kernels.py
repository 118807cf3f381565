"""The benchmark of kernels: what is measured, what may have a time, what is written down and read again."""

import json
import math
import time

import pytest
import torch
from cli_models import cli, refused, shorter

from zeroskip.bench import contest, kernels, suites
from zeroskip.bench.contest import Contest, batch, paired
from zeroskip.bench.kernels import Settings, bench_kernels
from zeroskip.bench.peers.remote import PeerError, WorkClock
from zeroskip.bench.report import markdown, text
from zeroskip.bench.results import KernelTable, Row, Spread
from zeroskip.bench.roofline import Level, Roofline, cache_bytes, roofline
from zeroskip.bench.suites import SUITES, Case, Suite, Zeros
from zeroskip.bench.timer import Race
from zeroskip.bench.turns import Turns
from zeroskip.errors import ZeroskipError
from zeroskip.prune.patterns import Pattern

LIMITS = Roofline(1, "avx2", {"fp32": 100.0}, {"fp32": 80.0, "bf16": 8.0}, (Level("memory", 1 << 20, 10.0),))
TINY = Case("tiny", 64, 64, Zeros("8:16@64", 0.5), 64 * 64 * 3)
FREE = Case("tiny", 48, 70, Zeros("unstructured", 0.7), 48 * 70)


@pytest.fixture
def tiny(monkeypatch):
    """A suite of two small cases, raced for next to no time, on a machine whose limits are known."""
    monkeypatch.setitem(suites.SUITES, "llm", Suite("llm", "two small cases", (TINY, FREE), (1, 4)))
    monkeypatch.setattr(contest, "race", shorter(contest.race))
    monkeypatch.setattr(kernels, "rooflines", lambda threads, budget_s: [LIMITS])


# Suites ---------------------------------------------------------------------------------------------------------------


def test_suites_hold_the_layers_of_the_models():
    shapes = {(case.model, case.m, case.k) for case in SUITES["llm"].cases}
    assert {(m, k) for model, m, k in shapes if model == "Llama-3 8B"} == {
        (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336),
    }  # fmt: skip
    assert {(m, k) for model, m, k in shapes if model == "Llama 1.1B"} == {
        (2048, 2048), (512, 2048), (8192, 2048), (2048, 8192),
    }  # fmt: skip
    parameters = {case.model: case.parameters for name in ("llm", "encoder") for case in SUITES[name].cases}
    assert parameters["Llama-3 8B"] == pytest.approx(6.98e9, rel=1e-3)  # 8.03e9 less embeddings and head
    assert parameters["BERT-base"] == 12 * (4 * 768 * 768 + 2 * 768 * 3072)


@pytest.mark.parametrize("name", SUITES)
def test_suites_begin_with_every_model_under_a_free_and_a_strip_pattern(name):
    cases = SUITES[name].cases
    assert len(set(cases)) == len(cases)
    if name != "synthetic":
        first = cases[: 2 * len({case.model for case in cases})]
        assert {case.model for case in first} == {case.model for case in cases}
        assert {case.zeros.pattern for case in first} == {"unstructured", "8:16@64"}


@pytest.mark.parametrize("zeros", suites.GRID, ids=str)
def test_zeros_are_where_the_pattern_has_them_and_follow_the_activations(zeros):
    case = Case("some", 1152, 192, zeros, 1)
    weight = case.weight()
    assert torch.equal(weight, case.weight()) and torch.equal(weight, weight.bfloat16().float())
    assert (weight == 0).float().mean() == pytest.approx(zeros.sparsity, abs=0.01)
    if zeros.pattern != "unstructured":
        kept = (weight != 0).float()
        again = Pattern.parse(zeros.pattern).select(kept, zeros.sparsity)
        assert torch.equal(again, kept.bool())
    norms = case.norms()
    strong = norms >= norms.sort().values[-20]
    assert (weight[:, strong] != 0).float().mean() > 1.3 * (1 - zeros.sparsity)
    x = case.activations(256)
    assert torch.equal(x, case.activations(256))
    torch.testing.assert_close(x.pow(2).mean(0).sqrt(), norms, rtol=0.3, atol=0)


# The race -------------------------------------------------------------------------------------------------------------


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


# Results --------------------------------------------------------------------------------------------------------------


def test_results_survive_json(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ZEROSKIP_PEERS", str(tmp_path / "none"))
    found = bench_kernels(Settings("llm", peers=("mkl",), minutes=0.0))
    assert found.rows == [] and found.left_out == [str(TINY), str(FREE)]
    found.rows = [
        Row("c", "tiny", 64, 64, "8:16@64", 0.5, 4, 1, "ours", "strip_nm bf16", "strip_nm", "bf16", False, "k", 9,
            0.5, 1.0, 2.0, 3.0, 4.0, {"best dense": Spread(1.5, 1.4, 1.6), "mkl fp32": Spread(3.0, 2.0, 4.0)}),
        Row("c", "tiny", 64, 64, "8:16@64", 0.5, 4, 1, "peer", "mkl fp32", "mkl", "fp32", False, "", 9, problem="gone"),
    ]  # fmt: skip
    path = tmp_path / "out.json"
    path.write_text(json.dumps(found.to_dict(), allow_nan=False))
    again = KernelTable.read(path)
    assert again.to_dict() == json.loads(path.read_text())
    assert again.rows == found.rows and again.rooflines == found.rooflines
    shown = cli("bench", "report", path, "--markdown")
    assert shown.exit_code == 0, shown.output
    assert "| strip_nm bf16 | 8:16@64 50% | 4 | 1 | 1 | 3 | 4 | 1.50 (1.50) | ~3.00 (3.00) |" in shown.stdout
    assert (
        "peer mkl did not take part: not installed" in shown.stdout and "no time was left for 2 cases" in shown.stdout
    )
    assert "| mkl fp32 |  | 0.00 | none |" in cli("bench", "report", path, "--markdown", "--details").stdout
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- llm begin -->\nold\n<!-- llm end -->\nafter\n")
    for _ in range(2):
        assert cli("bench", "report", path, "--into", page).exit_code == 0
        told = page.read_text()
        assert told.startswith("before\n") and told.endswith("\nafter\n") and "old" not in told
        assert told.count("| strip_nm bf16 |") == 1
    page.write_text("nothing")
    assert "has no place for llm" in refused("bench", "report", path, "--into", page)
    plain = cli("bench", "report", path).stdout
    assert "1.50 (1.40-1.60)" in plain and "gone" in plain


@pytest.mark.parametrize("content", ["{}", "[]", '{"schema": 1}', '{"schema": 2, "rows": []}', "not json"])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "out.json").write_text(content)
    line = refused("bench", "report", tmp_path / "out.json")
    assert "out.json" in line


def test_a_missing_peer_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ZEROSKIP_PEERS", str(tmp_path))
    result = cli(
        "bench", "kernels", "--suite", "llm", "--quick", "--peers", "mkl,openvino", "--json", tmp_path / "out.json"
    )
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["missing"] == ["mkl", "openvino"] and "--install mkl" in told["peers"]["mkl"]
    assert "peer openvino did not take part: not installed" in result.stdout
    assert math.isfinite(told["rows"][0]["ms"]) and told["settings"]["tokens"] == [1, 4]
    shown = cli("bench", "peers", "--json", tmp_path / "peers.json")
    assert shown.exit_code == 0 and "bench peers --install mkl" in shown.stdout
    assert json.loads((tmp_path / "peers.json").read_text())["peers"]["torch_csr"] == "installed"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--suite", "lm"), "did you mean 'llm'"),
        (("--peers", "onnxrutime"), "did you mean 'onnxruntime'"),
        (("--formats", "bitmsk"), "did you mean 'bitmask'"),
        (("--threads", "1;2"), "whole numbers with commas"),
        (("--tokens", "0"), "at least 1"),
    ],
)
def test_a_benchmark_that_is_not_served(tmp_path, options, problem):
    assert problem in refused("bench", "kernels", *options, "--json", tmp_path / "out.json")
    assert list(tmp_path.iterdir()) == []


# The roofline ---------------------------------------------------------------------------------------------------------


def test_roofline_survives_json_and_bounds_by_precision():
    measured = roofline(0.001, {"L2": 1 << 16, "memory": 1 << 18})
    assert Roofline.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured
    assert measured.peak_gflop_per_s["fp32"] > 0 and measured.memory_gb_per_s > 0
    wide = Roofline(1, "amx", {"fp32": 100.0, "bf16": 900.0}, {}, ())
    assert (wide.peak("fp32"), wide.peak("bf16"), wide.peak("int4")) == (100.0, 900.0, 900.0)
    assert LIMITS.peak("bf16") == 100.0


def test_native_loops_refuse_what_makes_no_sense():
    from zeroskip import _core

    assert _core.multiply_add(False, 10, 1) > 0 and _core.multiply_add(False, 10, 2) == 2 * _core.multiply_add(
        False, 10, 1
    )
    for call in (lambda: _core.multiply_add(False, -1, 1), lambda: _core.read_once(0, 64, 0)):
        with pytest.raises(ValueError, match="out of range"):
            call()
    _core.read_once(0, 0, 1)


def test_cache_sizes_come_from_the_system(tmp_path):
    assert cache_bytes(tmp_path) == (1 << 20, 32 << 20)
    for index, (level, size) in enumerate([("1", "32K"), ("2", "2048K"), ("3", "480M")]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "level").write_text(level + "\n")
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert cache_bytes(tmp_path) == (2 << 20, 480 << 20)


def test_settings_are_checked():
    for wrong in ({"threads": (0,)}, {"threads": ()}, {"tokens": (4, -1)}, {"peers": ("nobody",)}):
        with pytest.raises(ZeroskipError):
            Settings(**wrong)

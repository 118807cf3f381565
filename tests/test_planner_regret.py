"""The benchmark of the planner's choices: what it draws, how it judges, how it goes on."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

from zeroskip.bench.timer import Race

_path = Path(__file__).parents[1] / "benchmarks" / "planner_regret.py"
_spec = importlib.util.spec_from_file_location("planner_regret", _path)
bench = importlib.util.module_from_spec(_spec)
sys.modules["planner_regret"] = bench
_spec.loader.exec_module(bench)


def test_cases_stay_within_the_work_that_is_allowed_and_come_again():
    drawn = [bench.draw(random.Random(f"0 {number}"), 1.0) for number in range(200)]
    assert all(2e-9 * case.m * case.k * tokens <= 1.0 for case, tokens in drawn)
    assert drawn[7] == bench.draw(random.Random("0 7"), 1.0) and len(set(map(str, drawn))) > 150
    assert {case.zeros.pattern == "unstructured" for case, _ in drawn} == {True, False}


def test_the_luck_of_the_fastest_is_not_charged_to_the_choice():
    # Each is the faster one in one half of the rounds, by luck: the other half gives none of it back.
    lucky = Race({"a": [1.0, 1.25] * 8, "b": [1.25, 1.0] * 8}, rounds=16)
    for chosen in ("a", "b"):
        assert bench.apart(lucky, chosen) == pytest.approx((1.0 + 1.0 / 1.25) / 2 - 1)
    slower = Race({"a": [2.0] * 16, "b": [1.0] * 16, "lost": [0.5, 9.0]}, retired={"lost"}, rounds=16)
    assert bench.apart(slower, "a") == pytest.approx(1.0) and bench.apart(slower, "b") == pytest.approx(0.0)


def test_the_report_counts_what_is_beyond_the_limit():
    found = [bench.Regret(f"case {n}", 1, "a", "b", value, 0.01) for n, value in enumerate([0.0, 0.02, 0.055, 0.2])]
    lines = bench.report(found, 0.05)
    assert lines[1].startswith("case 3") or lines[2].startswith("case 3")  # the worst comes first
    assert lines[-1].startswith("regret: median 2.0%, 95th percentile 20.0%, worst 20.0%; 2 of 4 within 5%, 1 beyond")
    assert bench.quantile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0 and bench.quantile([1.0], 0.95) == 1.0


def test_a_second_run_goes_on_and_other_settings_are_refused(tmp_path, monkeypatch, capsys):
    done, path = [], tmp_path / "regret.json"

    def regret(case, tokens, precision, budget_s, second_s):
        done.append((str(case), tokens))
        return bench.Regret(str(case), tokens, "a", "b", 0.01, 0.0)

    monkeypatch.setattr(bench, "regret", regret)
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda count: None)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["planner_regret", "--json", str(path), "--threads", "1", *options])
        return bench.main()

    assert run("--cases", "2") == 0 and run("--cases", "5") == 0 and run("--cases", "5") == 0
    whole = [bench.draw(random.Random(f"0 {number}"), 4.5) for number in range(5)]
    assert done == [(str(case), tokens) for case, tokens in whole]
    assert len(json.loads(path.read_text())["cases"]) == 5
    assert "5 of 5 within 5%" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        run("--seed", "1")
    assert run("--cases", "9", "--minutes", "0") == 0 and len(done) == 5

"""A benchmark that was stopped goes on where it stopped; where sparse layouts begin to win is read off its rows."""

import json
from dataclasses import replace

import pytest
from cli_models import cli, refused, shorter

from zeroskip.bench import contest, kernels, suites
from zeroskip.bench.break_even import BEST, break_evens
from zeroskip.bench.kernels import Settings, bench_kernels
from zeroskip.bench.report import markdown, text
from zeroskip.bench.results import KernelTable, Row, Spread
from zeroskip.bench.roofline import Level, Roofline
from zeroskip.bench.suites import Case, Suite, Zeros
from zeroskip.errors import ZeroskipError

CASES = (
    Case("tiny", 64, 64, Zeros("8:16@64", 0.5), 64 * 64 * 3),
    Case("tiny", 48, 70, Zeros("unstructured", 0.7), 48 * 70),
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(suites.SUITES, "llm", Suite("llm", "two small cases", CASES, (1, 4)))
    monkeypatch.setattr(contest, "race", shorter(contest.race))
    monkeypatch.setattr(
        kernels,
        "rooflines",
        lambda counts, budget_s: [Roofline(n, "any", {"fp32": 9.0}, {}, (Level("memory", 1, 9.0),)) for n in counts],
    )


class Stop(Exception):
    pass


def stop_after(races, kept):
    def keep(found):
        kept.append(KernelTable.from_dict(json.loads(json.dumps(found.to_dict()))))
        if len(kept) == races:
            raise Stop

    return keep


def test_a_stopped_benchmark_goes_on_with_the_races_that_are_missing(tiny, monkeypatch):
    kept = []
    with pytest.raises(Stop):
        bench_kernels(Settings("llm"), keep=stop_after(3, kept))
    assert [len({(row.case, row.tokens) for row in one.rows}) for one in kept] == [1, 2, 3]
    assert kept[0].left_out == [str(case) for case in CASES] and kept[-1].left_out == [str(CASES[1])]
    again = []
    rows = contest.Contest.rows

    def counted(self, tokens, limits):
        again.append((str(self.case), tokens))
        return rows(self, tokens, limits)

    monkeypatch.setattr(contest.Contest, "rows", counted)
    found = bench_kernels(Settings("llm"), known=kept[-1])
    assert again == [(str(CASES[1]), 4)] and found.left_out == []
    assert found.rows[: len(kept[-1].rows)] == kept[-1].rows
    assert bench_kernels(Settings("llm"), known=found).rows == found.rows and len(again) == 1
    more = bench_kernels(Settings("llm", threads=(1, 2)), known=found)
    assert [one.threads for one in more.rooflines] == [1, 2] and len(again) == 5
    assert {row.threads for row in more.rows[len(found.rows) :]} == {2}


def test_a_benchmark_of_something_else_is_not_gone_on_with(tiny):
    found = bench_kernels(Settings("llm", minutes=0.0))
    for other in (replace(found, suite="encoder"), replace(found, machine="another")):
        with pytest.raises(ZeroskipError, match="begin a new one"):
            bench_kernels(Settings("llm"), known=other)
    with pytest.raises(ZeroskipError, match="cold_bytes"):
        bench_kernels(Settings("llm", cold_bytes=1), known=found)


def test_the_command_goes_on_with_its_json(tiny, tmp_path):
    path = tmp_path / "out.json"
    assert cli("bench", "kernels", "--threads", "1", "--budget", "0", "--json", path).exit_code == 0
    assert json.loads(path.read_text())["left_out"] == [str(case) for case in CASES]
    result = cli("bench", "kernels", "--threads", "1", "--resume", "--json", path)
    assert result.exit_code == 0, result.output
    told = json.loads(path.read_text())
    assert told["left_out"] == [] and {row["tokens"] for row in told["rows"]} == {1, 4}
    assert "--resume needs --json" in refused("bench", "kernels", "--resume")
    path.write_text("{}")
    assert "out.json" in refused("bench", "kernels", "--resume", "--json", path)


def test_a_number_that_another_run_may_not_give_is_marked():
    table = KernelTable("llm", "some", rows=[row(0.5, 2.0, 2.0), row(0.5, 0.5, 2.0, m=32)])
    assert "| 2.00 (2.00) | 1.00 (0.50) |" in markdown(table)
    table.rows[0].faster_than["dense int4"] = Spread(2.0, 1.2, 2.4)
    assert "| 2.00 (2.00) | ~1.00 (0.50) |" in markdown(table)


def test_the_summary_has_a_column_a_library_with_its_fastest_mode_that_is_as_precise():
    found = row(0.5, 2.0, 3.0, values="int8", layout="bitmask int8")
    others = {
        name: Spread(value, value, value)
        for name, value in {
            "dense int8": 1.5, "openvino int4": 0.4, "openvino bf16": 5.0, "openvino fp32": 6.0, "onednn bf16": 8.0,
            "onednn fp32": 7.0, "llama_cpp q4_K": 0.7,
        }.items()
    }  # fmt: skip
    found.faster_than.update(others)
    lines = markdown(KernelTable("llm", "some", rows=[found])).splitlines()
    head = next(line for line in lines if line.startswith("| layout"))
    assert head.endswith("| % read | best dense | own dense | onednn | openvino |")
    assert next(line for line in lines if line.startswith("| bitmask int8")).endswith(
        "| 3.00 (3.00) | 1.50 (1.50) | 7.00 (7.00) | 5.00 (5.00) |"
    )


# Break-even -----------------------------------------------------------------------------------------------------------


def row(sparsity, own, best, m=64, threads=1, **other):
    about = {"pattern": "unstructured", "layout": "bitmask int4", "format": "bitmask", "values": "int4"} | other
    spreads = {"dense int4": Spread(own, own, own), BEST: Spread(best, best, best)}
    return Row(
        "c", "some", m, 64, about["pattern"], sparsity, 1, threads, "ours", about["layout"], about["format"],
        about["values"], False, "k", 9, 0.5, 1.0, 2.0, 3.0, 4.0, spreads,
    )  # fmt: skip


def test_break_even_is_where_the_mean_over_the_shapes_crosses_one():
    rows = [row(0.5001, 0.4, 0.5), row(0.7, 0.9, 0.8), row(0.5, 1.6, 0.5, m=32), row(0.7, 1.6, 0.8, m=32)]
    own, best = sorted(break_evens(rows), key=lambda one: one.rival, reverse=True)
    assert (own.rival, own.shapes, own.threads) == ("dense int4", 2, 1)
    assert own.found.curve == pytest.approx({0.5: 0.8, 0.7: 1.2}) and own.found.sparsity == pytest.approx(0.6)
    assert str(own) == "60% (50% 0.80x, 70% 1.20x)"
    assert best.rival == BEST and best.found.sparsity is None and str(best).startswith("> 70%")


def test_break_even_keeps_apart_what_is_no_one_curve():
    strips = {"pattern": "8:16@64", "layout": "strip_nm bf16", "format": "strip_nm", "values": "bf16"}
    rows = [row(0.5, 2.0, 2.0), row(0.7, 3.0, 3.0), row(0.5, 0.5, 0.5, threads=2), row(0.5, 2.0, 2.0, **strips)]
    rows += [replace(row(0.9, 9.0, 9.0), ms=None), replace(row(0.9, 9.0, 9.0), role="peer")]
    found = break_evens(rows)
    assert [(one.threads, str(one.found)) for one in found] == [(1, "<= 50%"), (1, "<= 50%")]
    table = KernelTable("llm", "some", rows=rows)
    for shown in (text(table), markdown(table)):
        assert "Break-even" in shown and "<= 50% (50% 2.00x, 70% 3.00x)" in shown
    assert "Break-even" not in text(replace(table, rows=rows[:1]))

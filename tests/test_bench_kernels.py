"""The benchmark of kernels as a command: what is asked, written down and read again."""

import json
import math

import pytest
from bench_cases import FREE, TINY, two_cases
from cli_models import cli, refused

from zeroskip.bench.kernels import Settings, bench_kernels
from zeroskip.bench.results import KernelTable, Row, Spread
from zeroskip.errors import ZeroskipError


@pytest.fixture
def tiny(monkeypatch):
    two_cases(monkeypatch)


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
        (("--budget", "-1"), "the budget is -1.0 minutes: give 0 or more"),
        (("--budget", "nan"), "the budget is nan minutes"),
        (("--race", "-1"), "race_s is -1.0: give seconds above 0"),
        (("--race", "nan", "--quick"), "race_s is nan"),
        (("--cold-mb", "-5"), "cold_bytes is -5242880: give 0 or more"),
    ],
)
def test_a_benchmark_that_is_not_served(tmp_path, options, problem):
    assert problem in refused("bench", "kernels", *options, "--json", tmp_path / "out.json")
    assert list(tmp_path.iterdir()) == []


def test_settings_are_checked():
    for wrong in ({"threads": (0,)}, {"threads": ()}, {"tokens": (4, -1)}, {"peers": ("nobody",)}):
        with pytest.raises(ZeroskipError):
            Settings(**wrong)

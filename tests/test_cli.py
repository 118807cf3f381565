"""The command line: every command from end to end on small models."""

import json

import pytest
import torch
from cli_models import cli, shorter, zeroskip_process

from zeroskip.cli import app

pytestmark = pytest.mark.usefixtures("short_races")
LINES = "return the list\nopen a file and read a line\n\nraise an error\n"


@pytest.fixture
def pruned(encoder, text, tmp_path):
    out = tmp_path / "pruned"
    result = cli(
        "prune", encoder, out, "--pattern", "8:16@64", "--text", text, "--json", tmp_path / "prune.json", "--no-speed"
    )
    assert result.exit_code == 0, result.output
    return out


def commands(app, *before):
    """The words of every command that is registered."""
    for one in app.registered_commands:
        yield " ".join((*before, one.name))
    for group in app.registered_groups:
        yield from commands(group.typer_instance, *before, group.name or group.typer_instance.info.name)


@pytest.mark.parametrize("command", sorted(commands(app)))
def test_help_ends_with_an_example_and_offers_json(command):
    result = cli(*command.split(), "--help", env={"TERM": "dumb", "COLUMNS": "200"})
    assert result.exit_code == 0
    assert ("--json" in result.stdout) == (command != "serve")  # a server has no result
    assert "Example:" in result.stdout and f"zeroskip {command}" in result.stdout


def test_help_does_not_import_transformers():
    script = (
        "import atexit, sys; sys.argv[1:] = ['--help']; atexit.register(lambda: print('transformers' in sys.modules)); "
    )
    run = zeroskip_process(script=script + "from zeroskip.cli import main; main()")
    out, errors = run.communicate(timeout=120)
    assert run.returncode == 0 and out.splitlines()[-1] == "False", errors


def test_prune_stores_an_ordinary_model_with_its_tokenizer(pruned, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(pruned)
    weight = model.encoder.layer[0].output.dense.weight
    assert (weight == 0).float().mean() == 0.5
    assert AutoTokenizer.from_pretrained(pruned)("return the list")["input_ids"]
    report = json.loads((tmp_path / "prune.json").read_text())
    assert report["sparsity"] == 0.5 and len(report["rows"]) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prune.json", "pruned"]  # the journal is gone


def test_compile_then_run(pruned, tmp_path):
    out = tmp_path / "compiled"
    result = cli(
        "compile", pruned, out, "--tokens", "1:3,16:1", "--precision", "bf16", "--json", tmp_path / "plan.json"
    )
    assert result.exit_code == 0, result.output
    assert "plan for" in result.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["tokens"] == {"counts": [1, 16], "weights": [3.0, 1.0]} and plan["precision"] == "bf16"

    lines = cli("run", out, "--jsonl", input=LINES)
    assert lines.exit_code == 0, lines.output
    rows = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [row["text"] for row in rows] == [line for line in LINES.splitlines() if line]
    ours = torch.tensor([row["embedding"] for row in rows])
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(3))

    dense = cli("run", pruned, "--text", "return the list", "--json", tmp_path / "run.json")
    assert dense.exit_code == 0 and "1 lines of 64 numbers" in dense.stdout
    vector = torch.tensor(json.loads((tmp_path / "run.json").read_text())["lines"][0]["embedding"])
    assert torch.dot(vector, ours[0]) > 0.999


def test_compile_batch_invariant(pruned, tmp_path):
    result = cli(
        "compile", pruned, tmp_path / "held", "--tokens", "4", "--batch-invariant", "--json", tmp_path / "plan.json"
    )
    assert result.exit_code == 0, result.output
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["batch_invariant"] and plan["sites"] and all(site["pinned"] for site in plan["sites"])
    assert "batch-invariant: one kernel at each site" in result.stdout


def test_run_names_the_nearest_line(encoder):
    result = cli("run", encoder, "--text", "open the file", "--text", "return a list", "--text", "open the file")
    first, second, third, _ = result.stdout.splitlines()
    assert "1.000 line 3" in first and "1.000 line 1" in third and "1.000" not in second


def test_run_cuts_a_line_where_the_model_ends(encoder):
    result = cli("run", encoder, "--text", "return the list " * 100, "--max-tokens", 10**6)
    assert result.exit_code == 0, result.output


def test_run_continues_a_prompt(decoder, tmp_path):
    result = cli("run", decoder, "--prompt", "return the", "--max-new-tokens", 5, "--json", tmp_path / "run.json")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "run.json").read_text())
    assert told["text"].startswith("return the") and 1 <= told["new_tokens"] <= 5


def test_analyze_advises(pruned, tmp_path):
    result = cli("analyze", pruned, "--tokens", "8", "--json", tmp_path / "analysis.json")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "analysis.json").read_text())
    assert told["advice"] and told["advice"] in " ".join(result.stdout.split())


def test_info_tells_rows_and_limits(tmp_path):
    result = cli("info", "--no-roofline", "--json", tmp_path / "info.json")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "info.json").read_text())
    assert told["isa in use"] in told["isa available"] and "scalar" in told["isa available"]
    assert told["threads"] == torch.get_num_threads()
    assert len(told["openmp"]) == 1 and told["warnings"] == []  # torch's runtime is ours


def test_info_measures_the_roofline(monkeypatch, tmp_path):
    from zeroskip.bench import roofline

    monkeypatch.setattr(roofline, "_sizes", lambda threads: {"L2": 1 << 16, "memory": 1 << 18})
    monkeypatch.setattr(roofline, "race", shorter(roofline.race))
    result = cli("info", "--json", tmp_path / "info.json")
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "info.json").read_text())["roofline"]
    assert measured[0]["threads"] == 1 and measured[0]["peak_gflop_per_s"]["fp32"] > 0
    assert [level["name"] for level in measured[0]["read"]] == ["L2", "memory"]
    assert "1 thread: peak fp32" in result.stdout

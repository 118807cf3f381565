"""The command line: every command from end to end on small models, and every kind of bad input as one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_models import shorten_races, shorter, write_decoder, write_encoder
from typer.testing import CliRunner

from zeroskip.cli import app, main, process
from zeroskip.cli.process import cpu_limit, openmp_runtimes
from zeroskip.cli.terminal import progress

COMMANDS = ["info", "analyze", "prune", "compile", "run", "bench kernels", "bench peers", "bench report", "demo"]
LINES = "return the list\nopen a file and read a line\n\nraise an error\n"


def cli(*words, **options):
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(word) for word in words], **options)


def refused(*words, **options):
    """Run it, check that it was refused as bad input in one line, and return the line."""
    result = cli(*words, **options)
    *steps, line = result.stderr.splitlines()
    assert result.exit_code == 2, result.stderr
    assert line.startswith("zeroskip: "), result.stderr
    assert not any(step.startswith("zeroskip: ") or "Traceback" in step for step in steps)
    return line


def zeroskip_process(*words, script=None, **environment):
    """Start the command line in a process of its own."""
    what = ["-c", script] if script else ["-m", "zeroskip", *map(str, words)]
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, *what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | environment,
    )


@pytest.fixture(autouse=True)
def short_races(monkeypatch):
    shorten_races(monkeypatch)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text(
        "\n\n".join(f"return the {word} of a list in order" for word in ("name", "key", "file", "item") * 4)
    )
    return path


@pytest.fixture
def pruned(encoder, text, tmp_path):
    out = tmp_path / "pruned"
    result = cli("prune", encoder, out, "--pattern", "8:16@64", "--text", text, "--json", tmp_path / "prune.json")
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_and_offers_json(command):
    result = cli(*command.split(), "--help", env={"TERM": "dumb", "COLUMNS": "200"})
    assert result.exit_code == 0
    assert "--json" in result.stdout
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


def test_run_names_the_nearest_line(encoder):
    result = cli("run", encoder, "--text", "open the file", "--text", "return a list", "--text", "open the file")
    first, second, third, _ = result.stdout.splitlines()
    assert "1.000 line 3" in first and "1.000 line 1" in third and "1.000" not in second


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


# Bad input ------------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "no such directory" in refused(
        "prune", tmp_path / "absent", tmp_path / "out", "--method", "magnitude", "--pattern", "2:4"
    )
    assert "no such directory" in refused("compile", "./absent", tmp_path / "out")
    assert "cannot be loaded" in refused("analyze", "nobody/nothing")
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_read(encoder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    assert "has no config.json" in refused("compile", broken, tmp_path / "out")
    (broken / "config.json").write_text((encoder / "config.json").read_text())
    (broken / "model.safetensors").write_bytes((encoder / "model.safetensors").read_bytes()[:5000])
    assert "model.safetensors" in refused("run", broken, "--text", "a")
    (broken / "config.json").write_text("{")
    assert "config.json" in refused("prune", broken, tmp_path / "out", "--method", "magnitude", "--sparsity", 0.5)
    assert "is a file" in refused("analyze", broken / "config.json")


def test_a_model_with_nothing_to_prune(encoder, tmp_path):
    asked = ("--method", "magnitude", "--sparsity", 0.5, "--exclude", "*")
    assert "nothing to prune" in refused("prune", encoder, tmp_path / "out", *asked)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--sparsity", "1.0"), r"sparsity is 1.0: give a fraction of zeros in \[0, 1\)"),
        (("--sparsity", "-0.1"), "sparsity is -0.1"),
        (("--sparsity", "nan"), "sparsity is nan"),
        ((), "'unstructured' needs a sparsity"),
        (("--pattern", "2:4", "--sparsity", "0.7"), "has sparsity 0.5, not 0.7"),
        (("--pattern", "64:2:4"), "write '2:4@64'"),
        (("--pattern", "unstructred"), "did you mean 'unstructured'"),
        (("--pattern", "3:5"), r"encoder\.layer\.0.*multiple of 5"),
        (("--pattern", "block:7x1", "--sparsity", "0.5"), r"encoder\.layer\.0.*multiple of 7"),
        (("--sparsity", "0.5", "--method", "magnitud"), "did you mean 'magnitude'"),
        (("--sparsity", "0.5", "--include", "encoder.layer.0.output.dens"), "did you mean"),
        (("--sparsity", "0.5", "--method", "wanda"), "give --text FILE or --calibration FILE"),
        (("--sparsity", "0.5", "--json", "no/such/place.json"), "--json no/such/place.json"),
    ],
)
def test_a_recipe_that_does_not_fit(encoder, tmp_path, options, problem):
    line = refused("prune", encoder, tmp_path / "out", "--method", "magnitude", *options)
    assert re.search(problem, line), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("prune", "model", "out", "--sparsity", "half"), "Invalid value for '--sparsity'"),
        (("prune", "model"), "Missing argument 'OUT'"),
        (("prnue",), "No such command 'prnue'"),
        (("info", "--jsn", "x"), "No such option: --jsn"),
    ],
)
def test_words_that_no_command_takes(monkeypatch, capsys, words, problem):
    monkeypatch.setattr(sys, "argv", ["zeroskip", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert re.fullmatch(rf"zeroskip: {problem}.* --help tells more\)\n", err), err


def test_the_recipe_is_read_before_the_model(tmp_path):
    wrong = {"--sparsity": (1.5, "sparsity is 1.5"), "--include": ("re:(", "is not a regular expression")}
    for option, (value, problem) in wrong.items():
        asked = ("--method", "magnitude", option, value)
        assert problem in refused("prune", tmp_path / "absent", tmp_path / "out", *asked)
    assert "at least 1" in refused("compile", tmp_path / "absent", tmp_path / "out", "--tokens", 0)


def test_calibration_that_cannot_be_used(encoder, tmp_path):
    from safetensors.torch import save_file

    ids = torch.randint(4, 40, (10, 8))
    cases = {
        "empty": ({}, "holds no tensors"),
        "no rows": ({"input_ids": ids[:0].clone()}, "holds no tensors"),
        "uneven": ({"input_ids": ids, "attention_mask": ids[:3].clone()}, "one equal number of rows"),
        "nan": ({"inputs_embeds": torch.full((2, 4, 64), float("nan"))}, "holds NaN or Inf"),
        "inf": ({"inputs_embeds": torch.full((2, 4, 64), float("inf"))}, "holds NaN or Inf"),
        "argument": ({"pixels": ids}, "input_ids"),
        "vocabulary": ({"input_ids": ids + 1000}, "the model does not run on calibration batch 0"),
    }
    (tmp_path / "data").mkdir()
    for name, (tensors, problem) in cases.items():
        path = tmp_path / "data" / f"{name}.safetensors"
        save_file(tensors, path)
        assert problem in refused("prune", encoder, tmp_path / "out", "--pattern", "2:4", "--calibration", path)
    (tmp_path / "data" / "not").write_bytes(b"12345678910")
    assert "cannot be read" in refused(
        "prune", encoder, tmp_path / "out", "--pattern", "2:4", "--calibration", tmp_path / "data" / "not"
    )
    (tmp_path / "data" / "blank.txt").write_text(" \n")
    for file, problem in (("blank.txt", "holds no text"), ("absent.txt", "no readable UTF-8 file")):
        asked = ("--pattern", "2:4", "--text", tmp_path / "data" / file)
        assert problem in refused("prune", encoder, tmp_path / "out", *asked)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_calibration_tensors_prune_like_text_does(encoder, tmp_path):
    from safetensors.torch import save_file

    ids = torch.randint(4, 40, (10, 8), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tmp_path / "data.safetensors")
    asked = ("--pattern", "2:4", "--calibration", tmp_path / "data.safetensors", "--json", tmp_path / "report.json")
    assert cli("prune", encoder, tmp_path / "out", *asked).exit_code == 0
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["tokens"] == 80


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(encoder, tmp_path, bad):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(encoder)
    model.encoder.layer[1].output.dense.weight.data[3, 5] = bad
    model.save_pretrained(tmp_path / "broken")
    asked = ("--method", "magnitude", "--sparsity", 0.5)
    for line in (
        refused("prune", tmp_path / "broken", tmp_path / "out", *asked),
        refused("compile", tmp_path / "broken", tmp_path / "out"),
    ):
        assert "encoder.layer.1.output.dense" in line and "NaN or Inf" in line
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--precision", "int4"), "'int4' comes with"),
        (("--precision", "bf61"), "did you mean 'bf16'"),
        (("--tokens", "0"), "at least 1"),
        (("--tokens", "one"), "--tokens 'one'"),
        (("--tokens", "1:-3"), "a weight is a number above 0"),
    ],
)
def test_a_compilation_that_is_not_served(encoder, tmp_path, options, problem):
    line = refused("compile", encoder, tmp_path / "out", *options)
    assert problem in line, line
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_taken(encoder, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    for words in (("prune", encoder, taken, "--method", "magnitude", "--sparsity", 0.5), ("compile", encoder, taken)):
        assert "exists and is not an empty directory" in refused(*words)
        assert "exists and is not an empty directory" in refused(*words[:2], taken / "notes.txt", *words[3:])
    assert "exists and is no model of zeroskip" in refused("demo", "--out", taken, "--json", tmp_path / "demo.json")
    assert (taken / "notes.txt").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_an_unfinished_output_of_another_recipe(encoder, text, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "journal.json").write_text('{"version": 1, "recipe": "other"}')
    line = refused("prune", encoder, tmp_path / "out", "--pattern", "2:4", "--text", text)
    assert "is of another run" in line
    assert (partial / "journal.json").exists() and not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_but_the_journal(encoder, text, tmp_path, monkeypatch):
    import errno

    from zeroskip.io import container

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(container, "_write_tensor", full)
        line = refused("prune", encoder, tmp_path / "out", "--pattern", "2:4", "--text", text)
        assert "the disk is full" in line
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
        assert "the disk is full" in refused("compile", encoder, tmp_path / "compiled", "--tokens", "4")
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert cli("prune", encoder, tmp_path / "out", "--pattern", "2:4", "--text", text).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_run_needs_what_fits_the_model(encoder, decoder):
    assert "is a language model: give --prompt" in refused("run", decoder, "--text", "a")
    assert "is an encoder (BertModel)" in refused("run", encoder, "--prompt", "a")
    assert "no text" in refused("run", encoder, input="\n \n")


def test_a_model_without_a_tokenizer(encoder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((encoder / name).read_bytes())
    assert "tokenizer" in refused("run", tmp_path, "--text", "a")


@pytest.mark.parametrize("row", ["sse9", "amx"])
def test_an_isa_row_that_this_cpu_does_not_have(row):
    from zeroskip import isa

    if row in isa().available:
        pytest.skip(f"this CPU has the row {row}")
    run = zeroskip_process("info", "--no-roofline", ZEROSKIP_ISA=row)
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0
    assert f"ZEROSKIP_ISA={row}: " in errors and "this CPU offers scalar" in errors.splitlines()[-1]


def test_debugging_lets_the_exception_through(tmp_path):
    result = cli("compile", tmp_path / "absent", tmp_path / "out", env={"ZEROSKIP_DEBUG": "1"})
    assert isinstance(result.exception, ValueError) and result.exit_code == 1


# Interruptions --------------------------------------------------------------------------------------------------------


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.002)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_prune_goes_on_to_the_same_bits(how, text, tmp_path):
    source = write_encoder(tmp_path / "source", layers=12)
    words = ("prune", source, tmp_path / "out", "--pattern", "8:16@64", "--text", text)
    process = zeroskip_process(*words)
    journal = tmp_path / "out.partial"
    wait_for(lambda: len(list(journal.glob("*.safetensors"))) >= 2, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=120)
    assert len(list(journal.glob("*.safetensors"))) >= 2 and not (tmp_path / "out").exists()
    if how == signal.SIGINT:
        assert process.returncode == 130, errors
        last = errors.splitlines()[-1]
        assert last.startswith("zeroskip: interrupted") and "out.partial" in last and "Traceback" not in errors
    for out in ("out", "whole"):
        assert cli(*words[:2], tmp_path / out, *words[3:]).exit_code == 0
    assert not journal.exists()
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "whole"))
    assert one == two


def test_ctrl_c_counts_even_where_cleaning_up_fails(monkeypatch, tmp_path):
    from zeroskip.cli import models

    def interrupt(_):
        try:
            raise KeyboardInterrupt
        finally:
            {}.pop("half-made")

    monkeypatch.setattr(models, "load", interrupt)
    result = cli("compile", tmp_path, tmp_path / "out")
    assert result.exit_code == 130 and result.stderr.splitlines()[-1] == "zeroskip: interrupted"


# What the terminal shows ----------------------------------------------------------------------------------------------


def test_progress_is_plain_lines_without_a_terminal(capsys):
    with progress("working") as advance:
        advance(1, 2, "first")
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"working\nworking: done in \d+\.\d s\n", err)


def test_cpu_limit_of_both_kinds_of_control_groups(tmp_path):
    mine = tmp_path / "cgroup"
    mine.write_text("0::/a/b\n")
    group = tmp_path / "root" / "a" / "b"
    group.mkdir(parents=True)
    assert cpu_limit(tmp_path / "root", mine) is None
    (group / "cpu.max").write_text("max 100000\n")
    assert cpu_limit(tmp_path / "root", mine) is None
    (group.parent / "cpu.max").write_text("150000 100000\n")
    assert cpu_limit(tmp_path / "root", mine) == 1.5

    mine.write_text("4:cpu,cpuacct:/job\n3:memory:/job\n")
    job = tmp_path / "root" / "cpu" / "job"
    job.mkdir(parents=True)
    (job / "cpu.cfs_quota_us").write_text("400000\n")
    (job / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_limit(tmp_path / "root", mine) == 4.0
    (job / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_limit(tmp_path / "root", mine) is None
    assert cpu_limit(tmp_path, tmp_path / "absent") is None


def test_a_container_s_limit_is_honoured(monkeypatch):
    monkeypatch.setattr(process, "cpu_limit", lambda: 2.5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(4)
    process.honour_cpu_limit()
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    torch.set_num_threads(4)
    process.honour_cpu_limit()
    assert torch.get_num_threads() == 4


def test_openmp_runtimes_are_counted_by_file(tmp_path):
    maps = tmp_path / "maps"
    rows = ["lib/libgomp-a1b2.so.1", "lib/libgomp-a1b2.so.1", "lib/libc.so.6", "opt/libiomp5.so", "x/libcompute.so"]
    maps.write_text(
        "".join(f"7f00-7f01 r-xp 00000000 08:01 42   /{row}\n" for row in rows) + "7f00-7f01 rw-p 0 00:00 0\n"
    )
    assert openmp_runtimes(maps) == ["/lib/libgomp-a1b2.so.1", "/opt/libiomp5.so"]
    assert Path("/proc/self/maps").exists() is bool(openmp_runtimes())

"""Every kind of bad input to the command line: one line, exit code 2, and nothing is written or lost."""

import json
import re
import sys

import pytest
import torch
from cli_models import cli, refused, write_tokenizer, zeroskip_process
from tiny_models import t5

from zeroskip.cli import main

pytestmark = pytest.mark.usefixtures("short_races")


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
    for file, problem in (("blank.txt", "holds no text"), ("absent.txt", "absent.txt: no such file")):
        asked = ("--pattern", "2:4", "--text", tmp_path / "data" / file)
        for model in (encoder, tmp_path / "absent"):  # the text is read before the model is
            assert problem in refused("prune", model, tmp_path / "out", *asked)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_calibration_tensors_prune_like_text_does(encoder, tmp_path):
    from safetensors.torch import save_file

    ids = torch.randint(4, 40, (10, 8), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tmp_path / "data.safetensors")
    asked = ("--pattern", "2:4", "--calibration", tmp_path / "data.safetensors", "--json", tmp_path / "report.json")
    assert cli("prune", encoder, tmp_path / "out", *asked, "--no-speed").exit_code == 0
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
        (("--precision", "int5"), "give fp32, bf16, int8, int4, or leave it out (did you mean 'int8'"),
        (("--precision", "bf61"), "did you mean 'bf16'"),
        (("--tokens", "0"), "at least 1"),
        (("--tokens", "one"), "--tokens 'one'"),
        (("--tokens", "1:-3"), "a weight is a number above 0"),
        (("--tokens", "1:10,4,1:5"), "1 has two weights"),
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

    whole = container._write_tensor

    def full(file, tensor):
        if ".partial/" in file.name and "0000" in file.name:  # finished blocks still fit
            return whole(file, tensor)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(container, "_write_tensor", full)
        line = refused("prune", encoder, tmp_path / "out", "--pattern", "2:4", "--text", text)
        assert "the disk is full" in line
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
        assert "the disk is full" in refused("compile", encoder, tmp_path / "compiled", "--tokens", "4")
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert cli("prune", encoder, tmp_path / "out", "--pattern", "2:4", "--text", text, "--no-speed").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_cannot_be_made(encoder, tmp_path):
    (tmp_path / "file").touch()
    for model in (encoder, tmp_path / "absent"):
        line = refused("prune", model, tmp_path / "file" / "out", "--method", "magnitude", "--sparsity", 0.5)
        assert f"cannot be made: {tmp_path}/file is no directory" in line


def test_what_include_names_and_exclude_leaves_out(decoder, tmp_path):
    asked = ("--method", "magnitude", "--sparsity", 0.5, "--include", "lm_head")
    line = refused("prune", decoder, tmp_path / "out", *asked)
    assert "such as lm_head (excluded by 'lm_head', the default); give another, '' for none" in line
    assert cli("prune", decoder, tmp_path / "out", *asked, "--exclude", "", "--no-speed").exit_code == 0


def test_an_encoder_decoder_is_no_encoder(tmp_path):
    t5().save_pretrained(tmp_path / "both")
    write_tokenizer(tmp_path / "both", ["<pad>", "<unk>", "<eos>"])
    for asked in (("--text", "a"), ("--prompt", "a")):
        assert "has an encoder and a decoder; causal" in refused("run", tmp_path / "both", *asked)


def test_run_needs_what_fits_the_model(encoder, decoder):
    assert "is a language model: give --prompt" in refused("run", decoder, "--text", "a")
    assert "is an encoder (BertModel)" in refused("run", encoder, "--prompt", "a")
    assert "no text" in refused("run", encoder, input="\n \n")
    assert "--prompt is for a language model" in refused("run", decoder, "--prompt", "a", "--text", "b")


def test_text_that_is_no_utf8(encoder, decoder):
    wrong = b"caf\xe9".decode(errors="surrogateescape")  # how it comes from a terminal or a pipe
    assert "line 2: is not UTF-8 (character 4)" in refused("run", encoder, "--text", "a", "--text", wrong)
    assert "--prompt: is not UTF-8" in refused("run", decoder, "--prompt", wrong)


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

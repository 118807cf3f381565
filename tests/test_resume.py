"""A run that is killed goes on from its journal to the same bits."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import MODELS, batches, llama

from zeroskip.errors import ZeroskipError
from zeroskip.model import find_sites
from zeroskip.prune import methods, prune
from zeroskip.prune.composition import Composition
from zeroskip.prune.learner import Learner

HERE = Path(__file__).parent

# Prunes, and kills itself with -9: either just after the record of block `at` is there, or in the middle of writing it.
SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from tiny_models import MODELS, batches
from zeroskip.calibrate import journal
from zeroskip.prune import prune
from zeroskip.prune.learner import Learner

Learner.least = 8  # as conftest.py has it
kind, method, path, at, middle, stream = sys.argv[1:]
real = os.replace

def replace(source, target):
    mine = str(target).endswith(f"{int(at):05d}.safetensors")
    if mine and middle == "middle":
        with open(source, "r+b") as file:
            file.truncate(100)
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
    if mine:
        os.kill(os.getpid(), signal.SIGKILL)

journal.os.replace = replace
prune(MODELS[kind](), method, pattern="2:4@16", calibration=batches(kind), journal=path, stream=bool(stream))
"""


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("kind", "method", "at", "how", "stream"),
    [
        ("llama", "wanda+ls", 1, "after", False),
        ("t5", "wanda+ls", 2, "middle", False),
        ("llama", "sparsegpt+gptq", 2, "middle", True),
        ("llama", "wanda+distill", 3, "middle", False),
        ("bert", "wanda+tune+distill", 3, "after", False),
    ],
)
def test_kill_minus_nine_and_resume_gives_the_same_bits(tmp_path, one_thread, kind, method, at, how, stream):
    make = MODELS[kind]
    path = tmp_path / "journal"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])}
    run = [sys.executable, "-c", SCRIPT, kind, method, str(path), str(at), how, "yes" if stream else ""]
    assert subprocess.run(run, env=environment, check=False).returncode == -signal.SIGKILL
    finished = sorted(file.name for file in path.glob("*.safetensors"))
    assert finished == [f"{index:05d}.safetensors" for index in range(at + (how == "after"))]

    whole, resumed = make(), make()
    first = prune(whole, method, pattern="2:4@16", calibration=batches(kind))
    second = prune(resumed, method, pattern="2:4@16", calibration=batches(kind), journal=path, stream=stream)
    want, got = bits(whole), bits(resumed)
    assert all(torch.equal(value, got[name]) for name, value in want.items())
    assert [(row.name, row.error, row.sparsity) for row in first.rows] == [
        (row.name, row.error, row.sparsity) for row in second.rows
    ]


@pytest.mark.parametrize("method", methods())
def test_every_method_resumes_after_any_number_of_blocks(tmp_path, monkeypatch, method):
    monkeypatch.setattr(Learner, "least", 4)
    model, again, path = llama(), llama(), tmp_path / "journal"
    given = {"sparsity": 0.4, "calibration": batches("llama", 2), "journal": path}
    if not Composition.parse(method).method.chooses:
        given["sparsity"] = None
    prune(model, method, **given)
    (path / "00002.safetensors").unlink()
    (path / "00001.safetensors").rename(path / "00001.safetensors.new")  # written, not yet in its place
    prune(again, method, **given)
    assert all(torch.equal(value, bits(again)[name]) for name, value in bits(model).items())
    for one, two in zip(find_sites(model), find_sites(again), strict=True):
        assert (one.scales is None) == (two.scales is None) and (
            one.scales is None or torch.equal(one.scales, two.scales)
        )
    finished = llama()
    prune(finished, method, **given)
    assert all(torch.equal(value, bits(finished)[name]) for name, value in bits(model).items())


@pytest.mark.parametrize("part", ["recipe", "weights", "data"])
def test_a_journal_of_another_run_is_refused(tmp_path, part):
    model, given, method = llama(), batches("llama", 1), "wanda"
    prune(model, method, pattern="2:4", calibration=given, journal=tmp_path / "j")
    again = model if part == "weights" else llama()
    given = batches("llama", 2) if part == "data" else given
    method = "wanda+ls" if part == "recipe" else method
    with pytest.raises(ZeroskipError, match=f"another run \\({part} differ"):
        prune(again, method, pattern="2:4", calibration=given, journal=tmp_path / "j")


def test_what_is_no_journal_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ZeroskipError, match="holds other files"):
        prune(llama(), "magnitude", pattern="2:4", journal=tmp_path)
    with pytest.raises(ZeroskipError, match="is a file"):
        prune(llama(), "magnitude", pattern="2:4", journal=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_two_runs_do_not_share_a_journal(tmp_path):
    refused = []

    def progress(done, total, name):
        if done == 1:
            with pytest.raises(ZeroskipError, match="is in use by another run") as caught:
                prune(llama(), "magnitude", pattern="2:4", journal=tmp_path / "j")
            refused.append(caught)

    prune(llama(), "magnitude", pattern="2:4", journal=tmp_path / "j", progress=progress)
    assert len(refused) == 1
    prune(llama(), "magnitude", pattern="2:4", journal=tmp_path / "j")


def test_a_full_disk_gets_one_line_and_keeps_what_is_finished(tmp_path, monkeypatch):
    real, syncs = os.fsync, []

    def fsync(file):
        syncs.append(file)
        if len(syncs) == 9:  # each file is synced, and its directory: the head, two of the first block, then the second
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ZeroskipError, match=r"00001\.safetensors: cannot be written: the disk is full") as caught:
        prune(llama(), "magnitude", pattern="2:4", journal=tmp_path / "j")
    assert "\n" not in str(caught.value)
    left = sorted(path.name for path in (tmp_path / "j").iterdir())
    assert left == ["00000.json", "00000.safetensors", "00001.json", "journal.json"]
    prune(llama(), "magnitude", pattern="2:4", journal=tmp_path / "j")
    with pytest.raises(ZeroskipError, match="cannot be made"):
        prune(llama(), "magnitude", pattern="2:4", journal="/proc/none/j")


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def retell(path):
    path.write_text(path.read_text().replace('"sparsity": 0.5', '"sparsity": 0.9'))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("00001.safetensors", cut),
        ("00001.safetensors", flip),
        ("00001.scales", flip),
        ("00001.scales", Path.unlink),
        ("00001.json", retell),
        ("00001.json", cut),
        ("00001.json", Path.unlink),
    ],
)
def test_damage_gets_one_line_and_the_run_goes_on_without_the_block(tmp_path, file, damage):
    given = {"pattern": "2:4", "calibration": batches("llama", 1), "journal": tmp_path / "j"}
    prune(whole := llama(), "sparsegpt+gptq", **given)
    damage(tmp_path / "j" / file)
    with pytest.raises(ZeroskipError, match=r"00001\.safetensors is damaged .*: delete") as caught:
        prune(llama(), "sparsegpt+gptq", **given)
    assert "\n" not in str(caught.value)
    (tmp_path / "j" / "00001.safetensors").unlink()
    prune(again := llama(), "sparsegpt+gptq", **given)
    assert all(torch.equal(value, bits(again)[name]) for name, value in bits(whole).items())


def test_a_damaged_head_gets_one_line(tmp_path):
    prune(llama(), "magnitude", pattern="2:4", journal=tmp_path / "j")
    (tmp_path / "j" / "journal.json").write_text(json.dumps([]))
    with pytest.raises(ZeroskipError, match="is not readable"):
        prune(llama(), "magnitude", pattern="2:4", journal=tmp_path / "j")


def test_equal_runs_record_equal_weights(tmp_path):
    for name in ("one", "two"):
        prune(llama(), "wanda", pattern="2:4", calibration=batches("llama", 1), journal=tmp_path / name, stream=True)
    files = sorted((tmp_path / "one").glob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}

"""Peers: their names, environments and files, and the protocol with a worker, played by a library made up here."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from zeroskip.bench import peers
from zeroskip.bench.check import Checker
from zeroskip.bench.peers import environments
from zeroskip.bench.peers.base import Mode, int4_groups
from zeroskip.bench.peers.remote import WORKER, PeerError, PeerProcess, WorkClock
from zeroskip.errors import ZeroskipError

# The worker of a library that doubles nothing, prints where it must not, and fails when told to.
MADE_UP = """
import os, runpy, sys
from pathlib import Path

worker = Path({worker!r})
read = runpy.run_path(str(worker), run_name="worker")
load_peer = read["load_peer"]

def made_up(name):
    load_peer("torch_csr")
    from zeroskip.bench.peers.base import Work

    class MadeUp:
        def version(self):
            print("a banner on stdout")
            os.write(1, b"another one\\\\n")
            return "1.2"

        def load(self, mode, weight, copies, threads, tokens):
            if mode == "broken":
                raise ValueError("cannot do this\\\\nand says more")
            if mode == "dead":
                sys.stderr.write("the last words\\\\n")
                sys.stderr.flush()
                os._exit(3)
            if mode == "hung":
                import time
                time.sleep(60)
            rounded = weight.round(1)
            return Work(lambda x: [x @ rounded.T] * copies, copies, rounded.nbytes, rounded)

    return MadeUp()

read["main"].__globals__["load_peer"] = made_up
read["main"]()
"""


@pytest.fixture
def process(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(MADE_UP.format(worker=str(WORKER)).replace("\\\\", "\\"))
    with PeerProcess("torch_csr", path, patience_s=20.0) as started:
        yield started


WEIGHT = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
X = torch.randn(3, 10, generator=torch.Generator().manual_seed(2))


def test_a_worker_answers_in_turn(process):
    assert process.version() == "1.2"
    nbytes, stands = process.load("some", WEIGHT, 4, 1, 3)
    assert nbytes == WEIGHT.nbytes
    torch.testing.assert_close(stands, WEIGHT.round(decimals=1))
    torch.testing.assert_close(process.check("some", X), X @ stands.t())
    assert 0 < process.seconds("some") < 1
    clock = WorkClock()
    before = clock()
    process.timed("some", clock)
    assert clock() - before < 0.05  # one of four multiplications, not the talk


def test_a_weight_is_loaded_once_until_forgotten(process):
    first = process.load("some", WEIGHT, 4, 1, 3)
    asked = []
    process._ask, ask = lambda **words: asked.append(words["do"]) or ask(**words), process._ask
    assert process.load("some", WEIGHT, 4, 1, 5)[1] is first[1] and asked == []
    process.load("some", WEIGHT, 4, 2, 5)
    process.forget()
    process.load("some", WEIGHT, 4, 2, 5)
    assert asked == ["load", "forget", "load"]


def test_a_shape_that_would_end_the_worker_is_refused():
    peer = peers.get("llama_cpp")()
    for mode, k in (("q4_K", 384), ("q4_0 repacked", 40)):
        with pytest.raises(ValueError, match=f"{k} inputs are not a multiple of"):
            peer.load(mode, np.zeros((4, k), np.float32), 1, 1, 1)


def test_an_error_is_one_line_and_the_worker_lives_on(process):
    with pytest.raises(PeerError, match=r"^torch_csr: ValueError: cannot do this$"):
        process.load("broken", WEIGHT, 1, 1, 3)
    assert process.version() == "1.2"


def test_a_worker_that_dies_leaves_its_last_words(process):
    with pytest.raises(PeerError, match="failed at 'load': the last words"):
        process.load("dead", WEIGHT, 1, 1, 3)
    with pytest.raises(PeerError, match="has ended"):
        process.version()
    process.load("some", WEIGHT, 4, 1, 3)  # the next weight has a worker of its own
    assert process.version() == "1.2"


def test_a_worker_that_hangs_is_ended(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(MADE_UP.format(worker=str(WORKER)).replace("\\\\", "\\"))
    with PeerProcess("torch_csr", path, patience_s=20.0) as process:
        process.version()
        process._patience_s = 0.2
        with pytest.raises(PeerError, match="failed at 'load'"):
            process.load("hung", WEIGHT, 1, 1, 3)


def test_the_real_worker_runs_the_peer_that_needs_no_environment():
    with PeerProcess("torch_csr") as process:
        assert process.version() == torch.__version__
        weight = WEIGHT * (WEIGHT > 0)
        _, stands = process.load("fp32", weight, 2, 1, 3)
        y = process.check("fp32", X)
    assert Checker().theirs(y, X, stands, Mode("fp32", 32)) is None


@pytest.mark.parametrize("name", peers.names())
def test_a_peers_file_needs_nothing_but_numpy(name):
    """It is read by the Python of another environment, where this package and torch are not."""
    script = f"import runpy; runpy.run_path({str(WORKER)!r})['load_peer']({name!r})\n"
    script += "import sys; print([m for m in ('torch', 'zeroskip._core', 'zeroskip.errors') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert peers.get(name).modes and len({mode.name for mode in peers.get(name).modes}) == len(peers.get(name).modes)


def test_choose(monkeypatch, tmp_path):
    monkeypatch.setenv("ZEROSKIP_PEERS", str(tmp_path))
    assert environments.choose("auto") == peers.names() and environments.choose("none") == []
    assert environments.choose("mkl, openvino,mkl") == ["mkl", "openvino"]
    with pytest.raises(ZeroskipError, match="did you mean 'openvino'"):
        environments.choose("mkl,openvno")
    with pytest.raises(ZeroskipError, match="give 'auto'"):
        environments.choose(",")
    assert environments.missing("torch_csr") is None
    assert environments.missing("mkl") == "not installed: zeroskip bench peers --install mkl"
    with pytest.raises(ZeroskipError, match="did you mean 'mkl'"):
        environments.install("mlk")
    with pytest.raises(ZeroskipError, match="needs no environment"):
        environments.install("torch_csr")
    assert list(tmp_path.iterdir()) == []


def test_an_environment_that_cannot_be_made_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("ZEROSKIP_PEERS", str(tmp_path / "peers"))
    called = []

    def run(command, **given):
        called.append(command)
        (tmp_path / "peers" / "mkl").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, len(called) - 1)

    monkeypatch.setattr(environments.subprocess, "run", run)
    with pytest.raises(ZeroskipError, match=r"install mkl sparse-dot-mkl scipy.* failed with code 1"):
        environments.install("mkl")
    assert not (tmp_path / "peers" / "mkl").exists() and "venv" in called[0]


def test_int4_groups_round_to_half_a_step():
    weight = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float32)
    weight[2] = 0
    weight[3, :32] = 0
    codes, scales, stands = int4_groups(weight, 32)
    assert codes.shape == (5, 3, 32) and scales.shape == (5, 3) and stands.shape == weight.shape
    assert codes.min() >= 1 and codes.max() <= 15 and (codes[:, 2, 6:] == 8).all()
    again = ((codes.astype(np.float32) - 8) * scales[:, :, None]).reshape(5, -1)[:, :70]
    assert (again == stands).all() and (stands[weight == 0] == 0).all()
    step = np.repeat(scales, 32, axis=1)[:, :70]
    assert (np.abs(stands - weight) <= 0.51 * step).all()
    assert (scales == scales.astype(np.float16)).all()


@pytest.mark.parametrize("mode", [Mode("fp32", 32), Mode("bf16", 16, "bf16"), Mode("int4", 4, activation_group=4)])
def test_a_peer_may_round_as_much_as_it_says_and_no_more(mode):
    torch.manual_seed(0)
    weight, x = torch.randn(7, 10), torch.randn(5, 10)
    x[0, 3] = 30.0
    if mode.values == "bf16":
        near = x.bfloat16().float() @ weight.bfloat16().float().t()
    elif mode.activation_group:
        grouped = torch.nn.functional.pad(x, (0, 2)).view(5, 3, 4)
        scale = grouped.abs().amax(-1, keepdim=True) / 127
        near = ((grouped / scale).round() * scale).reshape(5, 12)[:, :10] @ weight.t()
    else:
        near = x @ weight.t()
    assert Checker().theirs(near, x, weight, mode) is None
    far = near.clone()
    far[4, 6] += 0.5 * float(x[4].abs() @ weight[6].abs())
    assert "times the bound" in Checker().theirs(far, x, weight, mode)
    assert "NaN" in Checker().theirs(near * torch.nan, x, weight, mode)
    assert "expected" in Checker().theirs(near[:, :6], x, weight, mode)


def test_protocol_is_what_the_worker_documents():
    """One JSON object a line, an error for what cannot be done, and the end of stdin ends the process."""
    words = [{"do": "time", "mode": "fp32"}, {"do": "forget"}]
    asked = "".join(json.dumps(one) + "\n" for one in words)
    done = subprocess.run(
        [sys.executable, "-I", str(WORKER), "torch_csr"], input=asked, capture_output=True, text=True, timeout=120
    )
    time, forget = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0 and forget == {}
    assert time == {"error": "KeyError: 'fp32'"}

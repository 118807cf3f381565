"""Whole models of other libraries: weights written for llama.cpp, and the protocol, played by a made-up library."""

import json
import math
import stat
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from zeroskip.bench import llm_rivals, peers
from zeroskip.bench.llm_rivals import ModelProcess, Rivals, why_not
from zeroskip.bench.llm_work import Work
from zeroskip.bench.peers import llama_model
from zeroskip.bench.peers.remote import WORKER, WorkClock

MADE_UP = """
import runpy, sys
import numpy as np

read = runpy.run_path({worker!r}, run_name="worker")

class Model:
    load_s, nbytes = 0.25, 1000

    def __init__(self, scale):
        self.scale = scale

    def ready(self, ids, decode):
        self.ids = ids

    def first(self):
        return 0.5

    def step(self):
        return 0.125 * len(self.ids)

    def logits(self, place):
        return np.arange(8, dtype=np.float32) * self.scale

    def losses(self, windows):
        return 2.0 * windows[:, 1:].size, int(windows[:, 1:].size)

    def close(self):
        print("closed")

class MadeUp:
    def version(self):
        return "1"

    def make_models(self, folder, into):
        if "bad" in str(folder):
            raise ValueError("cannot read this")
        return {{"good": 10, "rough": 5}}

    def open_model(self, mode, into, threads):
        return Model({scale} if mode == "good" else 1.5)

read["main"].__globals__["load_peer"] = lambda name: MadeUp()
read["main"]()
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A peer 'llama_cpp' of this Python; the function sets how wrong the better of its two modes is."""
    python = tmp_path / "llama_cpp" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("ZEROSKIP_PEERS", str(tmp_path))

    def write(scale):
        worker = tmp_path / "worker.py"
        worker.write_text(MADE_UP.format(worker=str(WORKER), scale=scale))
        monkeypatch.setattr(llm_rivals, "ModelProcess", partial(ModelProcess, worker=worker))

    return write


LOGITS = torch.arange(8, dtype=torch.float32)
IDS = torch.tensor([[1, 2, 3]])


def test_every_mode_takes_part(made_up, tmp_path):
    made_up(1.01)
    work = Work(tmp_path / "work", {})
    with Rivals(["llama_cpp", "onnxruntime"], [], work) as rivals:
        good, rough = rivals.open(IDS, LOGITS, 1)
        assert (good.name, good.role, good.disk_bytes, good.memory_bytes) == ("llama_cpp good", "rival", 10, 1000)
        assert good.logits_error == pytest.approx(0.01, rel=1e-3) and rough.logits_error == pytest.approx(0.5)
        assert good.footprint.load_s == 0.25 and good.footprint.first_token_s == 0.5
        assert "onnxruntime" in rivals.missing
        clock = WorkClock()
        for what, ids, seconds in (("first token", IDS, 0.5), ("decode", IDS.repeat(4, 1), 0.5)):
            run = rivals.found[0].runner(what, ids, clock)
            started = clock()
            run()
            assert clock() - started == pytest.approx(seconds, abs=0.05)
        told = rivals.found[1].perplexity(torch.zeros(3, 5, dtype=torch.int64))
        assert told["value"] == pytest.approx(math.exp(2)) and told["tokens"] == 12 and told["context"] == 5
        rivals.again(2)
    assert Work(tmp_path / "work", {}).peer("llama_cpp") == {"good": 10, "rough": 5}
    with Rivals(["llama_cpp"], ["rough"], work) as rivals:
        assert rivals.open(IDS, LOGITS, 1) == [] and "off by 0.5 of the largest" in rivals.missing["llama_cpp"]


def test_what_cannot_be_made_is_named(made_up, tmp_path):
    made_up(1.0)
    with Rivals(["llama_cpp"], [], Work(tmp_path / "bad", {})) as rivals:
        assert rivals.open(IDS, LOGITS, 1) == []
        assert "cannot read this" in rivals.missing["llama_cpp"]
    assert "runs no whole models" in why_not("openvino")
    assert peers.get("llama_cpp").model_modes == llama_model.MODES


# Files for llama.cpp --------------------------------------------------------------------------------------------------


def test_tensors_are_read_as_they_are_stored(tmp_path):
    draw = torch.Generator().manual_seed(0)
    stored = {
        "a": torch.randn(3, 5, generator=draw),
        "b": torch.randn(4, 2, generator=draw).bfloat16(),
        "c": torch.randn(7, generator=draw).half(),
    }
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    for name, values, is_bf16 in llama_model.tensors(tmp_path):
        assert is_bf16 == (name == "b")
        read = llama_model._as_float(values, is_bf16)
        np.testing.assert_array_equal(read, stored[name].float().numpy())
    many = torch.randn(1000, generator=draw) * 10.0 ** torch.randint(-30, 30, (1000,), generator=draw)
    bits = llama_model._to_bf16(many.numpy())
    np.testing.assert_array_equal(bits, many.bfloat16().view(torch.int16).numpy().view(np.uint16))
    save_file({"q": torch.zeros(4, dtype=torch.int8)}, tmp_path / "packed.safetensors")
    with pytest.raises(ValueError, match="only dense weights"):
        list(llama_model.tensors(tmp_path))


def test_queries_meet_keys_as_before():
    """Rotating halves, as transformers does, and neighbours of permuted rows, as llama.cpp does: the same products."""
    heads, size, place = 3, 8, 5
    draw = np.random.default_rng(0)
    angle = place / 100.0 ** (2 * np.arange(size // 2) / size)
    cos, sin = np.cos(angle), np.sin(angle)

    def halves(x):
        a, b = x[:, : size // 2], x[:, size // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], 1)

    def neighbours(x):
        a, b = x[:, 0::2], x[:, 1::2]
        return np.stack([a * cos - b * sin, b * cos + a * sin], 2).reshape(x.shape)

    query, key, x = (draw.standard_normal((heads * size, 6)) for _ in range(3))
    x = x[:6, 0]
    theirs = (halves((query @ x).reshape(heads, size)) * (key @ x).reshape(heads, size)).sum(1)
    moved = [(llama_model.permuted(w, heads) @ x).reshape(heads, size) for w in (query, key)]
    np.testing.assert_allclose((neighbours(moved[0]) * moved[1]).sum(1), theirs, rtol=1e-12)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2"},
        {"model_type": "llama", "attention_bias": True},
        {"model_type": "llama", "rope_parameters": {"rope_type": "llama3"}},
    ],
)
def test_what_is_no_plain_llama_is_refused(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="converted here"):
        llama_model.make(tmp_path, tmp_path / "out")

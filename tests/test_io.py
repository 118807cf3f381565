"""Store and load any module: what comes back is what went in, and a failure leaves nothing behind."""

from __future__ import annotations

import copy
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from io_models import KINDS, Plain, pack_sites, plain, same
from torch import nn

from zeroskip.dense_layers import OneDnnLinear
from zeroskip.errors import ZeroskipError
from zeroskip.formats import pack
from zeroskip.io import container, load, save
from zeroskip.io.container import read_header
from zeroskip.io.save import staged
from zeroskip.nn import PackedLinear
from zeroskip.prune.report import Report

torch.set_num_threads(1)


@pytest.mark.parametrize("kinds", [None, KINDS, ("onednn", "dense"), ("linear", "strip_nm"), ("linear", "onednn")])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_any_module_comes_back(tmp_path: Path, kinds: tuple[str, ...] | None, device: str) -> None:
    model = plain(kinds)
    save(model, tmp_path / "out")
    with torch.device(device):
        fresh = Plain()
    loaded = load(tmp_path / "out", model=fresh)
    assert loaded is fresh and not loaded.training
    if kinds is None or "linear" not in kinds:
        assert same(loaded, model)
    else:  # a dense site in another precision stays one
        assert torch.equal(loaded.up.weight, model.up.weight) and loaded.up.weight.dtype == torch.bfloat16
        assert same(loaded, model)
    assert fresh.head.weight is fresh.table.weight, "what was tied stays tied"
    assert fresh.mask.equal(model.mask) and fresh.scale.shape == ()
    assert (fresh.table.weight.requires_grad and not fresh.down.weight.requires_grad) or kinds is None


def test_a_layer_under_two_names_comes_back_under_both(tmp_path: Path) -> None:
    def twice() -> nn.Sequential:
        layer = nn.Linear(32, 32)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model = twice()
    model[0] = model[2] = PackedLinear.from_packed(pack(model[0].weight), model[0].bias.data)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out", model=twice())
    x = torch.randn(3, 32)
    assert isinstance(loaded[0], PackedLinear) and loaded[0] is loaded[2]
    assert torch.equal(loaded(x), model(x))


def test_the_file_is_laid_out_for_mapping(tmp_path: Path) -> None:
    model = plain()
    save(model, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["model.safetensors", "zeroskip.json"]
    entries = read_header(tmp_path / "out" / "model.safetensors")
    blobs = ["up.weight", "down.weight"]
    assert list(entries)[:2] == blobs and entries["up.weight"].begin % 4096 == 0
    for name in blobs:
        assert entries[name].begin % 64 == 0 and entries[name].dtype == torch.int8 and len(entries[name].shape) == 1
    loaded = load(tmp_path / "out", model=Plain())
    maps = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    spans = [[int(part, 16) for part in span.split("-")] for span in maps]
    for name in blobs:
        address = loaded.get_parameter(name).data_ptr()
        assert address % 64 == 0 and any(low <= address < high for low, high in spans), (
            "must be used where it is mapped"
        )


def test_shards(tmp_path: Path) -> None:
    model = plain()
    save(model, tmp_path / "out", max_shard_bytes=4000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["weight_map"]["up.weight"] == files[0]
    assert index["metadata"]["total_size"] == sum(
        entry.end - entry.begin for file in files for entry in read_header(tmp_path / "out" / file).values()
    )
    assert same(load(tmp_path / "out", model=Plain()), model)


def test_a_foreign_unaligned_file_is_copied_once(tmp_path: Path) -> None:
    model = plain()
    save(model, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    text = {}
    at = 0
    for name, tensor in sorted(tensors.items()):  # an unpadded header and no order: nothing is aligned
        span = [at, at := at + tensor.nbytes]
        text[name] = {"dtype": container.NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
    header = json.dumps(text).encode()
    header += b" " * (8 - (8 + len(header)) % 8 + 4)
    data = b"".join(bytes(t.reshape(-1).view(torch.uint8).numpy()) for _, t in sorted(tensors.items()))
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    entries = read_header(path)
    assert entries["up.weight"].begin % 64, "the test must make an unaligned file"
    loaded = load(tmp_path / "out", model=Plain())
    assert loaded.up.weight.data_ptr() % 64 == 0 and same(loaded, model)


def test_report_and_dtypes_come_back(tmp_path: Path) -> None:
    model = plain()
    model.norm.to(torch.float64)
    model.down.bias = nn.Parameter(torch.ones(32, dtype=torch.bfloat16), requires_grad=False)
    report = Report({"method": "magnitude", "seed": 3}, [], {"head": "tied"}, 1.5)
    object.__setattr__(model, "zeroskip_report", report)
    save(model, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "zeroskip.json").read_text())
    assert stored["recipe"] == report.recipe and stored["dtypes"]["norm.weight"] == "float64"
    loaded: Any = load(tmp_path / "out", model=Plain())
    assert loaded.zeroskip_report == report and not hasattr(loaded, "zeroskip_plan")
    assert loaded.norm.weight.dtype == torch.float64 and loaded.down.bias.dtype == torch.bfloat16
    assert copy.deepcopy(loaded).zeroskip_report == report


def test_a_prepacked_layer_is_written_without_a_second_copy_of_all(tmp_path: Path, monkeypatch: Any) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).eval()
    pack_sites(model, kinds=("onednn",))
    told: list[str] = []
    write, weight = container._write_tensor, OneDnnLinear.weight.fget

    def writing(file: Any, tensor: torch.Tensor) -> None:
        told.append("written" if tensor.shape == (64, 64) else "other")
        write(file, tensor)

    def unpacking(layer: Any) -> Any:
        told.append("unpacked")
        return weight(layer)

    monkeypatch.setattr(container, "_write_tensor", writing)
    monkeypatch.setattr(OneDnnLinear, "weight", property(unpacking))
    save(model, tmp_path / "out")
    assert [what for what in told if what != "other"] == ["unpacked", "written"] * 4
    monkeypatch.undo()
    x = torch.randn(3, 64)
    fresh = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    assert torch.allclose(load(tmp_path / "out", model=fresh)(x), model(x), atol=1e-5)


def test_a_model_under_torch_compile_is_filled(tmp_path: Path) -> None:
    model = plain(KINDS)
    save(torch.compile(model), tmp_path / "out")
    wrapped = torch.compile(Plain())
    assert load(tmp_path / "out", model=wrapped) is wrapped and same(wrapped._orig_mod, model)


# Failures while storing


@pytest.mark.parametrize("content", ["file", "full"])
def test_a_directory_in_use_is_refused(tmp_path: Path, content: str) -> None:
    target = tmp_path / "out"
    if content == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine").write_text("mine")
    with pytest.raises(ZeroskipError, match="exists and is not an empty directory"):
        save(plain(), target)
    assert (target if content == "file" else target / "mine").read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


def test_the_directory_one_is_in_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (".", tmp_path, "../" + tmp_path.name):
        with pytest.raises(ZeroskipError, match="is the directory you are in"):
            save(plain(), name)


KILLED = """
import os, signal, sys
import torch
from torch import nn
from zeroskip.io import container, save
write = container._write_tensor

def last_words(*given):
    write(*given)
    os.kill(os.getpid(), signal.SIGKILL)

container._write_tensor = last_words
save(nn.Linear(8, 8), sys.argv[1])
"""


def test_what_a_killed_process_left_is_removed_by_the_next_and_a_living_one_is_not_disturbed(tmp_path: Path) -> None:
    paths = os.pathsep.join(path for path in sys.path if path)
    target, other = tmp_path / "out", tmp_path / "other"
    for where in (target, other):
        run = subprocess.run(
            [sys.executable, "-c", KILLED, str(where)], env=os.environ | {"PYTHONPATH": paths}, check=False
        )
        assert run.returncode == -signal.SIGKILL
    first, second = sorted(os.listdir(tmp_path))
    assert first.startswith(".other.") and second.startswith(".out.")  # beside, never under the name itself
    with staged(target) as living:
        (living / "mine").write_text("mine")
        with pytest.raises(RuntimeError), staged(target):
            raise RuntimeError
        assert sorted(os.listdir(tmp_path)) == sorted([first, living.name]) and (living / "mine").exists()
    assert sorted(os.listdir(tmp_path)) == [first, "out"] and os.listdir(target) == ["mine"]


def test_an_empty_directory_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(plain(), tmp_path / "empty")
    save(plain(), tmp_path / "a" / "b" / "c")
    assert same(load(tmp_path / "empty", model=Plain()), load(tmp_path / "a" / "b" / "c", model=Plain()))


class _Full:
    """A file on a disk with room for `room` bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def __enter__(self) -> _Full:
        return self

    def __exit__(self, *problem: Any) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written: int = self.file.write(data)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 5000, 12000])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: Any, room: int) -> None:
    monkeypatch.setattr(container, "open", lambda *a: _Full(open(*a), room), raising=False)  # noqa: SIM115
    with pytest.raises(ZeroskipError, match="the disk is full; nothing was stored") as caught:
        save(plain(), tmp_path / "new" / "out")
    assert isinstance(caught.value.__cause__, OSError) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: Any, problem: type[BaseException]) -> None:
    def fail(*args: Any) -> None:
        raise problem

    monkeypatch.setattr(container, "_write_tensor", fail)
    with pytest.raises(problem):
        save(plain(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with torch.device("meta"):
        model: nn.Module = Plain()
    with pytest.raises(ZeroskipError, match="scale: is on the meta device"):
        save(model, tmp_path / "out")
    with pytest.raises(ZeroskipError, match="tokenizer is a str: give an object with save_pretrained"):
        save(plain(), tmp_path / "out", tokenizer="bert-base-uncased")
    with pytest.raises(ZeroskipError, match="max_shard_bytes is 0"):
        save(plain(), tmp_path / "out", max_shard_bytes=0)
    assert os.listdir(tmp_path) == []

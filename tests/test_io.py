"""Store and load any module: what comes back is what went in, and a failure leaves nothing behind."""

from __future__ import annotations

import copy
import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from io_models import Plain, pack_sites
from torch import nn

from zeroskip import _core
from zeroskip.errors import ZeroskipError
from zeroskip.formats.base import Packed
from zeroskip.io import container, load, save
from zeroskip.io.container import read_header
from zeroskip.nn import PackedLinear
from zeroskip.prune.report import Report

torch.set_num_threads(1)
IDS = torch.arange(12)
KINDS = ("strip_nm", "dense")


def _plain(kinds: tuple[str, ...] | None = KINDS) -> Plain:
    torch.manual_seed(0)
    model = Plain().eval()
    if kinds is not None:
        pack_sites(model, kinds=kinds)
    return model


def _same(one: nn.Module, other: nn.Module) -> bool:
    with torch.inference_mode():
        return torch.equal(one(IDS), other(IDS))


@pytest.mark.parametrize("kinds", [None, KINDS, ("onednn", "dense"), ("linear", "strip_nm"), ("linear", "onednn")])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_any_module_comes_back(tmp_path: Path, kinds: tuple[str, ...] | None, device: str) -> None:
    model = _plain(kinds)
    save(model, tmp_path / "out")
    with torch.device(device):
        fresh = Plain()
    loaded = load(tmp_path / "out", model=fresh)
    assert loaded is fresh and not loaded.training
    if kinds is None or "linear" not in kinds:
        assert _same(loaded, model)
    else:  # a dense site in another precision stays one
        assert torch.equal(loaded.up.weight, model.up.weight) and loaded.up.weight.dtype == torch.bfloat16
        assert _same(loaded, model)
    assert fresh.head.weight is fresh.table.weight, "what was tied stays tied"
    assert fresh.mask.equal(model.mask) and fresh.scale.shape == ()
    assert (fresh.table.weight.requires_grad and not fresh.down.weight.requires_grad) or kinds is None


def test_the_file_is_laid_out_for_mapping(tmp_path: Path) -> None:
    model = _plain()
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
    model = _plain()
    save(model, tmp_path / "out", max_shard_bytes=4000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["weight_map"]["up.weight"] == files[0]
    assert index["metadata"]["total_size"] == sum(
        entry.end - entry.begin for file in files for entry in read_header(tmp_path / "out" / file).values()
    )
    assert _same(load(tmp_path / "out", model=Plain()), model)


def test_a_foreign_unaligned_file_is_copied_once(tmp_path: Path) -> None:
    model = _plain()
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
    assert loaded.up.weight.data_ptr() % 64 == 0 and _same(loaded, model)


def test_report_and_dtypes_come_back(tmp_path: Path) -> None:
    model = _plain()
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
    alive: list[int] = []
    write = container._write_tensor

    def counting(file: Any, tensor: torch.Tensor) -> None:
        alive.append(sum(isinstance(t, torch.Tensor) and t.shape == (64, 64) for t in [tensor]))
        write(file, tensor)

    monkeypatch.setattr(container, "_write_tensor", counting)
    save(model, tmp_path / "out")
    assert sum(alive) == 4
    x = torch.randn(3, 64)
    fresh = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    assert torch.allclose(load(tmp_path / "out", model=fresh)(x), model(x), atol=1e-5)


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
        save(_plain(), target)
    assert (target if content == "file" else target / "mine").read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_directory_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(_plain(), tmp_path / "empty")
    save(_plain(), tmp_path / "a" / "b" / "c")
    assert _same(load(tmp_path / "empty", model=Plain()), load(tmp_path / "a" / "b" / "c", model=Plain()))


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
        save(_plain(), tmp_path / "new" / "out")
    assert isinstance(caught.value.__cause__, OSError) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: Any, problem: type[BaseException]) -> None:
    def fail(*args: Any) -> None:
        raise problem

    monkeypatch.setattr(container, "_write_tensor", fail)
    with pytest.raises(problem):
        save(_plain(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with torch.device("meta"):
        model: nn.Module = Plain()
    with pytest.raises(ZeroskipError, match="scale: is on the meta device"):
        save(model, tmp_path / "out")
    with pytest.raises(ZeroskipError, match="max_shard_bytes is 0"):
        save(_plain(), tmp_path / "out", max_shard_bytes=0)
    assert os.listdir(tmp_path) == []


# Damaged and hostile directories


def _stored(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    save(_plain(), folder)
    return folder


def _edit_blob(folder: Path, name: str, change: Callable[[bytearray], None], rehash: bool = True) -> None:
    path = folder / "model.safetensors"
    entry = read_header(path)[name]
    data = bytearray(path.read_bytes())
    blob = data[entry.begin : entry.end]
    change(blob)
    if rehash:  # as someone would who wants the damage to go unnoticed
        tensor = torch.frombuffer(blob, dtype=torch.int8).clone()
        struct.pack_into("<Q", blob, 40, _core.hash_blob(tensor.data_ptr(), tensor.numel()))
    data[entry.begin : entry.end] = blob
    path.write_bytes(data)


def _put(form: str, at: int, *values: Any) -> Callable[[bytearray], None]:
    return lambda blob: struct.pack_into(form, blob, at, *values)


BLOBS: dict[str, tuple[Callable[[bytearray], None], bool, str]] = {
    "magic": (_put("<8s", 0, b"PICKLED!"), True, "not a zeroskip blob"),
    "format": (_put("<8s", 8, b"strip_xy"), True, "strip_xy"),
    "rows": (_put("<I", 16, 80), True, "."),
    "no rows": (_put("<I", 16, 0), True, "impossible shape"),
    "columns": (_put("<I", 20, 4096), True, "."),
    "huge": (_put("<II", 16, 0xFFFFFFFF, 0xFFFFFFFF), True, "impossible shape"),
    "non-zeros": (_put("<Q", 24, 1 << 60), True, "more non-zeros"),
    "length": (_put("<Q", 32, 1 << 40), True, "truncated or extended"),
    "version": (_put("<H", 48, 2), True, "format version 2.*update zeroskip"),
    "value type": (_put("<B", 50, 9), True, "unknown value type 9"),
    "many sections": (_put("<B", 51, 255), True, "too many sections"),
    "M": (_put("<H", 54, 0), True, "."),
    "N": (_put("<H", 52, 63), True, "."),
    "V": (_put("<I", 56, 0), True, "."),
    "section outside": (_put("<Q", 64, 1 << 50), True, "does not lie inside the blob"),
    "section wraps": (_put("<QQ", 64, 64, 0xFFFFFFFFFFFFFFC0), True, "does not lie inside the blob"),
    "column out of range": (_put("<B", 128, 255), True, "column"),
    "a value, hash not redone": (lambda blob: blob.__setitem__(600, blob[600] ^ 1), False, "content hash differs"),
}


@pytest.mark.parametrize("case", BLOBS)
def test_edited_blobs_are_errors(tmp_path: Path, case: str) -> None:
    folder = _stored(tmp_path)
    change, rehash, message = BLOBS[case]
    _edit_blob(folder, "up.weight", change, rehash)
    with pytest.raises(ZeroskipError, match=message) as caught:
        load(folder, model=Plain())
    text = str(caught.value)
    assert text.startswith(f"{folder / 'model.safetensors'}: up.weight: ") and "\n" not in text


def test_a_sound_blob_of_another_shape_is_an_error(tmp_path: Path) -> None:
    model = _plain()
    layer = PackedLinear.from_packed(Packed.from_blob(model.up.weight.detach()), None)
    model.up = layer
    save(model, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "zeroskip.json").read_text())
    stored["sites"]["up"]["shape"] = [32, 64]
    (tmp_path / "out" / "zeroskip.json").write_text(json.dumps(stored))
    other = Plain()
    other.up = nn.Linear(64, 32, bias=False)
    with pytest.raises(ZeroskipError, match=r"up\.weight: the blob holds \(64, 32\) where the model has \(32, 64\)"):
        load(tmp_path / "out", model=other)


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(info: dict[str, Any]) -> None:
        for key in path[:-1]:
            info = info[key]
        info[path[-1]] = to

    return change


_DENSE = {"kind": "dense", "shape": [64, 32], "dtype": "float32", "bias": None}
SIDECARS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (_set("format_version", to=2), "format version 2; this zeroskip reads up to 1"),
    "no version": (_set("format_version", to=None), "format_version None"),
    "sites a list": (_set("sites", to=[]), "sites is missing or not an object"),
    "site a string": (_set("sites", "up", to="x"), "site up: a str"),
    "another kind": (_set("sites", "up", "kind", to="ternary"), "kind 'ternary' is not known"),
    "shape": (_set("sites", "up", "shape", to=[64, -32]), "site up: shape"),
    "other shape": (_set("sites", "up", "shape", to=[64, 33]), r"site up: stored as \[64, 33\] where the model has"),
    "nbytes": (_set("sites", "up", "nbytes", to=1 << 60), "site up: nbytes"),
    "other nbytes": (_set("sites", "up", "nbytes", to=128), r"up.weight: is int8 .* where int8 \[128\] was stored"),
    "bias": (_set("sites", "up", "bias", to="__class__"), "site up: bias"),
    "bias missing": (lambda info: info["sites"]["up"].pop("bias"), "site up: bias is missing"),
    "no bias": (_set("sites", "up", "bias", to=None), "up.bias: a Plain has no such tensor"),
    "activation": (_set("sites", "up", "activation", to="eval"), "site up: activation"),
    "transposed": (_set("sites", "up", to=_DENSE | {"transposed": True}), "stored transposed"),
    "dtypes": (_set("dtypes", to={"scale": "int8"}), "dtypes: scale: 'int8'"),
    "tied": (_set("tied", to={"a": 1}), "tied does not map"),
    "no such tensor": (_set("sites", to={"left": _DENSE}), "left.weight: is in none"),
    "no such layer": (_set("sites", to={"norm": _DENSE}), "site norm: a BatchNorm1d cannot be packed"),
    "plan": (_set("plan", to={"version": 1}), "the plan cannot be used"),
    "plan a list": (_set("plan", to=[1]), "the plan cannot be used"),
    "report": (_set("report", to={"rows": 3}), "the report cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("case", SIDECARS)
def test_an_edited_sidecar_is_an_error(tmp_path: Path, case: str) -> None:
    folder = _stored(tmp_path)
    path = folder / "zeroskip.json"
    info = json.loads(path.read_text())
    change, message = SIDECARS[case]
    change(info)
    path.write_text(json.dumps(info))
    with pytest.raises(ZeroskipError, match=message) as caught:
        load(folder, model=Plain())
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\0", '{"format_version": 1}'])
def test_a_damaged_sidecar_is_an_error(tmp_path: Path, text: str) -> None:
    folder = _stored(tmp_path)
    (folder / "zeroskip.json").write_text(text)
    with pytest.raises(ZeroskipError, match=r"zeroskip\.json: ") as caught:
        load(folder, model=Plain())
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    folder = _stored(tmp_path)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, 4096, 5000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ZeroskipError, match=r"model\.safetensors: "):
            load(folder, model=Plain())


INDEXES: dict[str, tuple[Any, str]] = {
    "outside": ({"up.weight": "../../etc/passwd.safetensors"}, "is not a safetensors file of this directory"),
    "absolute": ({"up.weight": "/etc/x.safetensors"}, "is not a safetensors file of this directory"),
    "pickle": ({"up.weight": "pytorch_model.bin"}, "is not a safetensors file of this directory"),
    "number": ({"up.weight": 3}, "is not a safetensors file of this directory"),
    "missing file": ({"up.weight": "other.safetensors"}, "cannot be read"),
    "missing tensor": ({"left.weight": "part.safetensors"}, "left.weight: is not in part.safetensors"),
    "empty": ({}, "has no weight_map"),
    "list": ([], "has no weight_map"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_hostile_index_is_an_error(tmp_path: Path, case: str) -> None:
    folder = _stored(tmp_path)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    places, message = INDEXES[case]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ZeroskipError, match=message):
        load(folder, model=Plain())


def test_tensors_missing_or_unexpected_are_errors(tmp_path: Path) -> None:
    folder = _stored(tmp_path)
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors | {"extra": torch.zeros(1)}, path)
    with pytest.raises(ZeroskipError, match="extra: a Plain has no such tensor"):
        load(folder, model=Plain())
    for name in ("norm.running_mean", "table.weight", "up.weight"):
        safetensors.torch.save_file({k: v for k, v in tensors.items() if k != name}, path)
        with pytest.raises(ZeroskipError, match=f"{name}: is in none of the weight files"):
            load(folder, model=Plain())


def test_directories_that_are_none_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ZeroskipError, match="no such directory"):
        load(tmp_path / "none")
    with pytest.raises(ZeroskipError, match=r"has no config\.json; pass the instance"):
        load(tmp_path)
    with pytest.raises(ZeroskipError, match=r"has no zeroskip\.json"):
        load(tmp_path, model=Plain())
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    with pytest.raises(ZeroskipError, match="other kinds of weight files are not read"):
        load(tmp_path)

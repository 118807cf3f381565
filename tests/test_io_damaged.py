"""Damaged and hostile directories: an error that names the file, the tensor and the problem, and never a crash."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from io_models import Plain, plain
from torch import nn

from zeroskip import _core
from zeroskip.errors import ZeroskipError
from zeroskip.formats.base import Packed
from zeroskip.io import load, save
from zeroskip.io.container import read_header
from zeroskip.nn import PackedLinear

torch.set_num_threads(1)


def _stored(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    save(plain(), folder)
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
    model = plain()
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
    "dense stack": (_set("sites", "up", to=_DENSE | {"stack": 5}), "stack is nothing that a dense layer has"),
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

"""Damaged, edited and foreign directories, through our loader and transformers' own: one line each."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from io_models import answer, pack_sites, tiny

import zeroskip  # noqa: F401
from zeroskip import plugin
from zeroskip.errors import ZeroskipError
from zeroskip.io import load, save
from zeroskip.io.container import read_header

plugin.install()
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

WEIGHTS = "model.safetensors"


def _compiled(tmp_path: Path) -> Path:
    save(pack_sites(tiny("bert")), tmp_path / "out")
    return tmp_path / "out"


def _refused(folder: Path, message: str) -> None:
    for loader in (load, transformers.AutoModelForMaskedLM.from_pretrained):
        with pytest.raises(ZeroskipError, match=message) as caught:
            loader(folder)
        assert "\n" not in str(caught.value)


def test_truncated_weights_are_an_error(tmp_path: Path) -> None:
    folder = _compiled(tmp_path)
    whole = (folder / WEIGHTS).read_bytes()
    for length in (0, 9, len(whole) // 2, len(whole) - 64):
        (folder / WEIGHTS).write_bytes(whole[:length])
        _refused(folder, WEIGHTS)


def test_an_edited_blob_is_an_error(tmp_path: Path) -> None:
    folder = _compiled(tmp_path)
    data = bytearray((folder / WEIGHTS).read_bytes())
    name, entry = next(iter(read_header(folder / WEIGHTS).items()))
    data[entry.begin + 300] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    _refused(folder, f"{WEIGHTS}: {name}: content hash differs")


def test_a_dense_tensor_under_a_packed_name_is_an_error(tmp_path: Path) -> None:
    folder = _compiled(tmp_path)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.int8)
    safetensors.torch.save_file(tensors | {name: torch.zeros(32, 32)}, folder / WEIGHTS, {"format": "pt"})
    _refused(folder, rf"{name}: is float32 \[32, 32\] where int8")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", "x", "'num_hidden_layers': .*expected int"),
        ("hidden_size", 33, "hidden size"),
        ("hidden_act", "no_such", "no_such"),
    ],
)
def test_a_config_that_says_what_it_cannot_is_an_error(tmp_path: Path, field: str, value: object, message: str) -> None:
    folder = _compiled(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(
        ZeroskipError, match=rf"{folder}: transformers cannot load it as BertForMaskedLM: .*{message}"
    ) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["missing", "missing blob", "unexpected"])
def test_missing_and_unexpected_tensors_are_errors(tmp_path: Path, what: str) -> None:
    folder = _compiled(tmp_path)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    blob = next(name for name, tensor in tensors.items() if tensor.dtype == torch.int8)
    if what == "unexpected":
        tensors["extra.weight"] = torch.zeros(2)
    else:
        del tensors[blob if what == "missing blob" else "bert.embeddings.LayerNorm.weight"]
    safetensors.torch.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    name = {"missing": "LayerNorm.weight: is in none", "missing blob": f"{blob}: is in none"}
    _refused(folder, name.get(what, "extra.weight: a BertForMaskedLM has no such tensor"))


def test_an_edited_config_is_an_error(tmp_path: Path) -> None:
    folder = _compiled(tmp_path)
    good = json.loads((folder / "config.json").read_text())
    name = next(iter(good["quantization_config"]["sites"]))
    for change, message in (
        ({"format_version": 9}, "format version 9; this zeroskip reads up to 1, update it"),
        ({"sites": {name: {"kind": "packed"}}}, f"site {name}: shape None"),
        ({"sites": None}, "sites is missing or not an object"),
        ({"plan": {"version": 7}}, "the plan cannot be used"),
        ({"plan": []}, "the plan cannot be used"),
        ({"tied": ["x"]}, "tied does not map names to names"),
    ):
        config = {**good, "quantization_config": {**good["quantization_config"], **change}}
        (folder / "config.json").write_text(json.dumps(config))
        _refused(folder, message)
    sites = copy.deepcopy(good["quantization_config"]["sites"])
    sites[name]["shape"] = sites[name]["shape"][::-1] if len(set(sites[name]["shape"])) > 1 else [64, 32]
    section = {**good["quantization_config"], "sites": sites}
    (folder / "config.json").write_text(json.dumps({**good, "quantization_config": section}))
    _refused(folder, rf"site {name}: stored as .* where the model has")


def test_hostile_ties_are_not_followed(tmp_path: Path) -> None:
    folder = _compiled(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    site = next(iter(config["quantization_config"]["sites"]))
    table = "bert.embeddings.word_embeddings.weight"
    tied = {"cls.predictions.decoder.weight": table, "cls.predictions.decoder.bias": "cls.predictions.bias"}
    tied |= {f"{site}.weight": table, "bert.config": "x", "bert.encoder": "bert"}
    config["quantization_config"]["tied"] = tied
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(answer(load(folder)), answer(pack_sites(tiny("bert"))))


def test_architectures_that_are_none(tmp_path: Path) -> None:
    folder = _compiled(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for names in (["os"], ["Nonsense"], [], None, [3], ["AutoModel"]):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": names}))
        with pytest.raises(ZeroskipError, match="has no architecture"):
            load(folder)


def test_what_transformers_refuses_is_one_line(tmp_path: Path) -> None:
    model = tiny("bert")
    save(model, tmp_path / "out")
    path = tmp_path / "out" / WEIGHTS
    tensors = safetensors.torch.load_file(path)
    tensors["bert.embeddings.word_embeddings.weight"] = torch.zeros(3, 3)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ZeroskipError, match="transformers cannot load it as BertForMaskedLM: ") as caught:
        load(tmp_path / "out")
    assert "\n" not in str(caught.value)
    del tensors["bert.embeddings.word_embeddings.weight"], tensors["bert.embeddings.LayerNorm.weight"]
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ZeroskipError, match="missing tensor for a BertForMaskedLM"):
        load(tmp_path / "out")


def test_a_model_quantized_by_others_is_refused(tmp_path: Path) -> None:
    model = tiny("bert")
    model.hf_quantizer = type("Q", (), {"quantization_config": type("C", (), {"quant_method": "awq"})()})()
    with pytest.raises(ZeroskipError, match="quantized by awq"):
        save(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []

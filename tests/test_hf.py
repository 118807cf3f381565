"""transformers reads what we store: our plugin with us, an error without us, and plain zeros without any plugin."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from io_models import HEADS, answer, pack_sites, tiny

import zeroskip  # noqa: F401
from zeroskip import plugin
from zeroskip.dense_layers import DenseLinear, OneDnnLinear, onednn_problem
from zeroskip.errors import ZeroskipError
from zeroskip.io import attach, load, save
from zeroskip.io.container import read_header
from zeroskip.io.sites import blobs_of
from zeroskip.planning.machine import this_machine
from zeroskip.planning.plan import Plan, SitePlan
from zeroskip.planning.tokens import Tokens
from zeroskip.prune.report import Report

plugin.install()
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

AUTO = {
    "llama": transformers.AutoModelForCausalLM,
    "gpt2": transformers.AutoModelForCausalLM,
    "bert": transformers.AutoModelForMaskedLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
}
WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("head", [False, True], ids=["head dense", "head packed"])
@pytest.mark.parametrize("kind", AUTO)
def test_a_compiled_model_comes_back(tmp_path: Path, kind: str, head: bool) -> None:
    model = pack_sites(tiny(kind), HEADS[kind] if head else None)
    before = json.dumps(model.config.to_dict(), default=str)
    expected = answer(model)
    save(model, tmp_path / "out")
    assert json.dumps(model.config.to_dict(), default=str) == before, "save must not modify the model"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "zeroskip"
    assert not (head and config["tie_word_embeddings"])
    for loaded in (load(tmp_path / "out"), AUTO[kind].from_pretrained(tmp_path / "out")):
        assert type(loaded) is type(model) and torch.equal(answer(loaded), expected)
        assert list(blobs_of(loaded)) == list(blobs_of(model))
        loaded.tie_weights()  # must not put a dense embedding back
        assert torch.equal(answer(loaded), expected)
        again = copy.deepcopy(loaded)
        assert torch.equal(answer(again), expected)
    # A foreign save_pretrained of the loaded model, then ours again.
    loaded.save_pretrained(tmp_path / "foreign")
    third = load(tmp_path / "foreign")
    save(third, tmp_path / "ours")
    assert torch.equal(answer(AUTO[kind].from_pretrained(tmp_path / "ours")), expected)
    for blob in blobs_of(third).values():
        assert blob.weight.data_ptr() % 64 == 0


@pytest.mark.parametrize("kind", AUTO)
def test_save_pretrained_of_a_model_just_compiled(tmp_path: Path, kind: str) -> None:
    model = pack_sites(tiny(kind), HEADS[kind])
    attach(model)
    model.tie_weights()
    expected = answer(model)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(answer(load(tmp_path / "out")), expected)
    with pytest.raises(ZeroskipError, match=f"{HEADS[kind]} is packed and cannot be resized"):
        model.resize_token_embeddings(90)
    assert torch.equal(answer(model), expected)
    restored = torch.load(_dumped(model, tmp_path / "whole.pt"), weights_only=False)
    assert torch.equal(answer(restored), expected)


def _dumped(model: Any, path: Path) -> Path:
    torch.save(model, path)
    return path


def test_the_blobs_are_used_where_the_file_is_mapped(tmp_path: Path) -> None:
    save(pack_sites(tiny("llama")), tmp_path / "out")
    model = AUTO["llama"].from_pretrained(tmp_path / "out")
    lines = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if WEIGHTS in line]
    spans = [[int(part, 16) for part in line.split("-")] for line in lines]
    for layer in blobs_of(model).values():
        address = layer.weight.data_ptr()
        assert address % 64 == 0 and any(low <= address < high for low, high in spans)
    assert model.hf_quantizer.is_compileable and not model.hf_quantizer.is_trainable


@pytest.mark.parametrize("kind", AUTO)
def test_the_body_alone_and_a_new_head(tmp_path: Path, kind: str) -> None:
    model = pack_sites(tiny(kind))
    save(model, tmp_path / "whole")
    body = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    assert type(body) is not type(model) and len(blobs_of(body)) >= len(blobs_of(model)) - 1  # BERT's head has a site
    expected = answer(body)
    save(body, tmp_path / "body")
    assert torch.equal(answer(load(tmp_path / "body")), expected)
    body.save_pretrained(tmp_path / "foreign")
    assert torch.equal(answer(transformers.AutoModel.from_pretrained(tmp_path / "foreign")), expected)
    headed = AUTO[kind].from_pretrained(tmp_path / "body")
    assert len(blobs_of(headed)) == len(blobs_of(body))


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_dense_layers_in_another_precision(tmp_path: Path, kind: str) -> None:
    model = pack_sites(tiny(kind), kinds=("strip_nm", "linear", "onednn"))
    expected = answer(model)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert torch.allclose(answer(loaded), expected, atol=1e-5)
    wanted = {name for name, layer in model.named_modules() if isinstance(layer, DenseLinear)}
    assert {name for name, layer in loaded.named_modules() if isinstance(layer, DenseLinear)} == wanted
    save(loaded, tmp_path / "again")
    assert torch.allclose(answer(load(tmp_path / "again")), expected, atol=1e-5)
    attach(model)
    model.save_pretrained(tmp_path / "foreign")
    assert torch.allclose(answer(load(tmp_path / "foreign")), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_compiled_to_dense_layers_only_is_right_in_plain_transformers(tmp_path: Path, kind: str) -> None:
    model = pack_sites(tiny(kind), kinds=("linear",))
    save(model, tmp_path / "out")
    plain = type(model).from_pretrained(_without_section(tmp_path / "out"))
    assert torch.allclose(answer(plain), answer(model), atol=2e-2)


def _without_section(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_plan_and_report_come_back_and_tune(tmp_path: Path) -> None:
    model = pack_sites(tiny("llama"), kinds=("strip_nm", "onednn"))
    sites = []
    for name, layer in blobs_of(model).items():
        packed = layer.packed
        shape, kernel = packed.shape, packed.kernel_for(1).rpartition("_")[0] + "_scalar"
        sites.append(
            SitePlan(name, shape, "fp32", packed.pattern, 0.5, packed.format, packed.values, [(None, kernel)], "", 1, 1)
        )
    for name, layer in model.named_modules():
        if isinstance(layer, OneDnnLinear):
            shape = (layer.out_features, layer.in_features)
            sites.append(SitePlan(name, shape, "fp32", "dense", 0.0, "onednn", "fp32", [(None, "torch")], "", 1, 1))
    plan = Plan(this_machine(), Tokens.parse((1, 8)), None, sites)
    report = Report({"method": "wanda+ls"}, [], {}, 2.0)
    object.__setattr__(model, "zeroskip_plan", plan)
    object.__setattr__(model, "zeroskip_report", report)
    save(model, tmp_path / "out")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["plan"] == json.loads(json.dumps(plan.to_dict())) and section["recipe"] == report.recipe
    loaded: Any = AUTO["llama"].from_pretrained(tmp_path / "out")
    assert loaded.zeroskip_plan == plan and loaded.zeroskip_report == report
    for layer in blobs_of(loaded).values():
        assert layer.packed.kernel_for(1).endswith("_scalar") and layer.packed.kernel_for(500).endswith("_scalar")
    if onednn_problem("fp32") is None:
        assert any(isinstance(layer, OneDnnLinear) for layer in loaded.modules())
    assert torch.allclose(answer(loaded), answer(model), atol=1e-5)
    body: Any = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert body.zeroskip_plan.sites[0].name == sites[0].name.removeprefix("model."), "names follow the model"


def test_a_pruned_model_is_an_ordinary_one(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    report = Report({"method": "magnitude"}, [], {}, 1.0)
    object.__setattr__(model, "zeroskip_report", report)

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    save(model, tmp_path / "out", tokenizer=Tokenizer(), max_shard_bytes=20_000)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tmp_path / "out" / "tokenizer.json").exists() and (tmp_path / "out" / "generation_config.json").exists()
    loaded: Any = load(tmp_path / "out")
    assert loaded.zeroskip_report == report and torch.equal(answer(loaded), answer(model))


def test_conv1d_that_became_linear_is_stored_as_conv1d(tmp_path: Path) -> None:
    from zeroskip.planning.install import thaw

    model = pack_sites(tiny("gpt2"), kinds=("dense",))
    thaw(model)
    save(model, tmp_path / "out")
    assert not blobs_of(load(tmp_path / "out"))
    assert torch.allclose(answer(load(tmp_path / "out")), answer(model), atol=1e-5)


def _python(code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


def test_without_us_a_pruned_model_loads_and_a_compiled_one_raises(tmp_path: Path) -> None:
    pruned = tiny("llama")
    with torch.no_grad():
        pruned.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    save(pruned, tmp_path / "pruned")
    for kind in ("llama", "gpt2"):
        save(pack_sites(tiny(kind)), tmp_path / kind)
    code = f"""
import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "pruned")!r})
assert bool((model.model.layers[0].mlp.up_proj.weight[:, ::2] == 0).all())
assert model.lm_head.weight is model.model.embed_tokens.weight
for kind in ("llama", "gpt2"):
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        try:
            auto.from_pretrained({str(tmp_path)!r} + "/" + kind)
        except RuntimeError as error:
            assert "mismatched" in str(error), error
        else:
            raise SystemExit("it loaded")
assert not any(name.startswith("zeroskip") for name in sys.modules)
"""
    result = _python(code)
    assert result.returncode == 0, result.stdout + result.stderr


def test_transformers_is_not_imported_until_needed_and_then_knows_us(tmp_path: Path) -> None:
    save(pack_sites(tiny("bert")), tmp_path / "out")
    code = f"""
import sys
from zeroskip import plugin
plugin.install(); plugin.install()
assert not any(name.split(".")[0] == "transformers" for name in sys.modules)
import transformers
assert "zeroskip.hf" not in sys.modules
transformers.AutoModelForMaskedLM.from_pretrained({str(tmp_path / "out")!r})
assert "Watch" not in repr(sys.meta_path)
"""
    result = _python(code)
    assert result.returncode == 0, result.stderr


def test_transformers_imported_first_is_told_at_once(monkeypatch: Any) -> None:
    table = sys.modules[plugin.TABLE]
    monkeypatch.delitem(table.AUTO_QUANTIZER_MAPPING, "zeroskip")
    monkeypatch.delitem(table.AUTO_QUANTIZATION_CONFIG_MAPPING, "zeroskip")
    monkeypatch.delitem(sys.modules, "zeroskip.hf")
    plugin.install()
    assert table.AUTO_QUANTIZER_MAPPING["zeroskip"].__name__ == "ZeroskipQuantizer"


def test_casts_leave_the_blobs_alone(tmp_path: Path) -> None:
    save(pack_sites(tiny("bert")), tmp_path / "out")
    model = load(tmp_path / "out")
    for cast in ("half", "bfloat16", "float"):
        getattr(model, cast)()
        assert all(layer.weight.dtype == torch.int8 for layer in blobs_of(model).values())
        assert torch.isfinite(answer(model)).all()
    as_bf16: Any = AUTO["bert"].from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert as_bf16.dtype == torch.bfloat16
    assert {layer.bias.dtype for layer in blobs_of(as_bf16).values()} == {torch.bfloat16}
    assert answer(as_bf16).dtype == torch.bfloat16


def test_tensors_in_a_dtype_of_their_own(tmp_path: Path) -> None:
    model = tiny("llama").bfloat16()
    model.model.norm.float()
    pack_sites(model, kinds=("dense",))
    save(model, tmp_path / "out")
    loaded: Any = AUTO["llama"].from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and loaded.model.norm.weight.dtype == torch.float32
    assert load(tmp_path / "out", model=tiny("llama")).model.norm.weight.dtype == torch.float32


def test_shards_and_an_instance(tmp_path: Path) -> None:
    model = pack_sites(tiny("t5"), "lm_head")
    save(model, tmp_path / "out", max_shard_bytes=30_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    expected = answer(model)
    assert torch.equal(answer(AUTO["t5"].from_pretrained(tmp_path / "out")), expected)
    filled = load(tmp_path / "out", model=tiny("t5"))
    assert torch.equal(answer(filled), expected)
    filled.save_pretrained(tmp_path / "foreign")
    assert torch.equal(answer(load(tmp_path / "foreign")), expected)


def test_an_unpacked_model_loses_the_section(tmp_path: Path) -> None:
    from zeroskip.planning.install import thaw

    model = pack_sites(tiny("bert"))
    attach(model)
    expected = answer(model)
    thaw(model)
    attach(model)
    model.save_pretrained(tmp_path / "out")
    plain = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert not blobs_of(plain) and torch.allclose(answer(plain), expected, atol=1e-2)


# Damaged directories


def _compiled(tmp_path: Path) -> Path:
    save(pack_sites(tiny("bert")), tmp_path / "out")
    return tmp_path / "out"


def _refused(folder: Path, message: str) -> None:
    for loader in (load, AUTO["bert"].from_pretrained):
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

"""transformers reads what we store: our plugin with us, an error without us, and plain zeros without any plugin."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from io_models import HEADS, answer, pack_sites, tiny

import zeroskip  # noqa: F401
from zeroskip import plugin
from zeroskip.dense_layers import DenseLinear, OneDnnLinear, onednn_problem
from zeroskip.errors import ZeroskipError
from zeroskip.io import attach, load, save
from zeroskip.io.verify import blobs_of
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

"""Embeddings that a recipe has rounded stay integers: the same rows, an eighth to a half of the bytes, everywhere."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import inject, prefer
from torch import nn

import zeroskip as zs
from zeroskip import _core
from zeroskip.embedding_layers import PackedEmbedding
from zeroskip.errors import ZeroskipError
from zeroskip.planning.install import thaw
from zeroskip.planning.plan import plan_of

IDS = torch.tensor([[5, 9, 33, 70, 12, 8], [7, 7, 61, 2, 90, 41]])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 99),
    st.sampled_from(["int8", "int4"]),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([1, 15, 16, 37]),
    st.sampled_from([1, 31, 64, 130]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_rows_are_those_of_the_dense_table(seed, values, group_size, m, k, dtype):
    draw = torch.Generator().manual_seed(seed)
    packed = zs.pack(torch.randn(m, k, generator=draw), "dense", values=values, group_size=group_size)
    table = PackedEmbedding.of(packed, dtype)
    ids = torch.randint(0, m, (3, 4), generator=draw)
    want = nn.functional.embedding(ids, zs.unpack(packed).to(dtype))
    assert torch.equal(table(ids), want) and table(ids).dtype == dtype
    assert torch.equal(table(ids[:0]), want[:0]) and torch.equal(table(ids[0, 0]), want[0, 0])
    for bad in (-1, m):
        with pytest.raises(IndexError, match=f"token {bad} is not in a table of {m}"):
            table(torch.tensor([0, bad]))


def test_a_cast_of_the_model_is_followed():
    table = PackedEmbedding.of(zs.pack(torch.randn(20, 32), "dense", values="int8"), torch.float32)
    blob = table.weight.detach().clone()
    both = nn.Sequential(copy.deepcopy(table), nn.Linear(32, 4))
    assert both.half()(IDS % 20).dtype == torch.float16 and torch.equal(both[0].weight, blob)


def test_only_integers_are_a_table():
    for packed in (zs.pack(torch.randn(20, 32), "dense"), zs.pack(torch.randn(20, 32), "bitmask", values="int8")):
        with pytest.raises(ZeroskipError, match="a table is stored as dense integers, not as"):
            PackedEmbedding.of(packed, torch.float32)


def model_of(dtype=torch.bfloat16, tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # and no buffer: loading makes those anew
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def rounded(embeddings="int8", **kind):
    model = model_of(**kind)
    zs.prune(model, "rtn", values="int4", group_size=32, embeddings=embeddings)
    return model


@pytest.mark.parametrize("embeddings", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_stores_and_loads_what_it_did(embeddings, dtype, monkeypatch, tmp_path):
    inject(monkeypatch, prefer("linear"), {"dense": 2.0, "compiled": 1.0})
    model = rounded(embeddings, dtype=dtype)
    table = model.model.embed_tokens.weight.detach().clone()
    with torch.inference_mode():
        want = model(IDS).logits
    zs.compile(model, tokens=(1, 8))
    packed = model.model.embed_tokens
    assert isinstance(packed, PackedEmbedding) and packed.values == embeddings
    row = next(site for site in plan_of(model).sites if site.name == "model.embed_tokens")
    assert (row.label, row.bytes_after) == (f"dense {embeddings}", packed.weight.nbytes) and row.is_packed
    assert "model.embed_tokens" in str(plan_of(model)) and model.dtype == dtype
    with torch.inference_mode():
        got = model(IDS).logits
    # The norms round once where transformers' round thrice, and in bf16 each rounding is a part in 256.
    close = 1e-5 if dtype is torch.float32 else 2e-2
    assert float((got - want).abs().max()) <= close * float(want.abs().max())
    with pytest.raises(ZeroskipError, match="is packed and cannot be resized"):
        model.resize_token_embeddings(100)

    zs.save(model, tmp_path / "out")
    from transformers import AutoModelForCausalLM

    for loaded in (zs.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert isinstance(loaded.model.embed_tokens, PackedEmbedding)
        with torch.inference_mode():
            assert torch.equal(loaded(IDS).logits, got)
            more = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False}
            assert torch.equal(loaded.generate(IDS, **more), model.generate(IDS, **more))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    assert half.model.embed_tokens(IDS).dtype == torch.float16

    again = zs.compile(rounded(embeddings, dtype=dtype), plan=plan_of(model))
    assert isinstance(again.model.embed_tokens, PackedEmbedding)
    assert "model.embed_tokens" in thaw(loaded)
    assert type(loaded.model.embed_tokens) is nn.Embedding and torch.equal(loaded.model.embed_tokens.weight, table)
    zs.compile(loaded, tokens=(1, 8))
    assert isinstance(loaded.model.embed_tokens, PackedEmbedding), "its codes were kept"


def test_what_stays_dense(monkeypatch):
    inject(monkeypatch, prefer("linear"), {"dense": 2.0, "compiled": 1.0})
    for model, options in (
        (rounded(tied=True), {}),  # the head has the same weight
        (rounded(), {"precision": "bf16"}),
        (rounded("none"), {}),
    ):
        zs.compile(model, tokens=1, **options)
        assert type(model.model.embed_tokens) is nn.Embedding
    model = rounded()
    model.model.embed_tokens.weight.data += 0.01 * torch.rand(96, 64)
    assert type(zs.compile(model, tokens=1).model.embed_tokens) is nn.Embedding, "it was trained on"


def test_a_slower_model_is_put_back_whole(monkeypatch):
    inject(monkeypatch, prefer("linear"), {"dense": 1.0, "compiled": 2.0})
    model = rounded()
    table = model.model.embed_tokens
    zs.compile(model, tokens=1)
    assert model.model.embed_tokens is table and not any(site.is_packed for site in plan_of(model).sites)


def test_a_directory_that_lies_about_its_tables(monkeypatch, tmp_path):
    inject(monkeypatch, prefer("dense int4"), {"dense": 2.0, "compiled": 1.0})
    zs.save(zs.compile(rounded(), tokens=1), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    sites = config["quantization_config"]["sites"]
    for name, table, said in (
        ("model.embed_tokens", None, "stored as a layer that multiplies where the model has a Embedding"),
        ("model.layers.0.mlp.up_proj", True, "stored as a table where the model has a Linear"),
        ("model.embed_tokens", 1.5, "table, where it is there, is true"),
    ):
        bad = copy.deepcopy(config)
        site = bad["quantization_config"]["sites"][name]
        site.pop("table", None)
        if table is not None:
            site["table"] = table
        (tmp_path / "out" / "config.json").write_text(json.dumps(bad))
        with pytest.raises(ZeroskipError, match=said):
            zs.load(tmp_path / "out")
    assert sites["model.embed_tokens"]["table"] is True


def test_rows_alone_and_in_batches_are_the_same(monkeypatch):
    inject(monkeypatch, prefer("dense int4"), {"dense": 2.0, "compiled": 1.0})
    from zeroskip.planning.invariant import make_invariant

    model = zs.compile(rounded(), tokens=(1, 8))
    make_invariant(model, up_to=3)
    assert isinstance(model.model.embed_tokens, PackedEmbedding)


@pytest.mark.parametrize("row", [name for name, missing in _core.isa_rows() if missing is None])
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_rows_come_out_alike_on_every_row_of_instructions_and_as_torch_unpacks_them(row, values):
    best = _core.isa_active()
    assert _core.isa_limit(row)
    try:
        for k, group_size in ((70, 32), (64, 64), (300, 128)):
            packed = zs.pack(torch.randn(40, k, generator=torch.Generator().manual_seed(k)), "dense", values=values,
                             group_size=group_size)  # fmt: skip
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                table = PackedEmbedding.of(packed, dtype)
                ids = torch.randint(0, 40, (7, 90), generator=torch.Generator().manual_seed(1))
                for given_ in (ids, ids.t(), ids[:1, :1]):
                    assert torch.equal(table(given_), table._unpacked(given_))
                assert torch.equal(table(ids.int()), table(ids))
    finally:
        assert _core.isa_limit(best)

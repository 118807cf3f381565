"""nn.MultiheadAttention and stacked experts through `zs.compile`: taken apart, packed, stored, loaded and put back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planning import close, inject, prefer
from site_models import MIXTURES, correlated
from torch import Tensor, nn

from zeroskip.attention_layers import SplitAttention
from zeroskip.compile import compile
from zeroskip.errors import ZeroskipError
from zeroskip.expert_layers import SplitExperts
from zeroskip.formats import pack
from zeroskip.io import load, save
from zeroskip.model import find_sites
from zeroskip.nn import PackedLinear
from zeroskip.planning import measure, recurrent
from zeroskip.planning.install import thaw
from zeroskip.planning.plan import Plan, plan_of
from zeroskip.split_layers import PackedStack, Stack, split_of

SPARSE = prefer("bitmask", "ours")
WON = {"dense": 2.0, "compiled": 1.0}


def thin(model: nn.Module, zeros: float = 0.7) -> nn.Module:
    draw = torch.Generator().manual_seed(1)
    for site in find_sites(model):
        weight = site.weight()
        site.write(weight * (torch.rand(weight.shape, generator=draw) >= zeros))
    return model


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that can be is packed."""
    inject(monkeypatch, SPARSE, WON)
    monkeypatch.setattr(recurrent, "race", measure.race)


@torch.inference_mode()
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("more", [{}, {"bias": False}, {"kdim": 8, "vdim": 12}])
def test_attention_taken_apart_gives_what_torch_does(first: bool, more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=first, **more).eval()
    kind = split_of(attention)
    assert kind is SplitAttention
    split = kind(attention, kind.products(attention))
    batch, queries, keys = 3, 5, 7
    x, memory = torch.randn(batch, queries, 16), torch.randn(batch, keys, more.get("kdim", 16))
    values = torch.randn(batch, keys, more.get("vdim", 16))
    causal = torch.ones(queries, keys).triu(1)
    masks: list[dict[str, Any]] = [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"attn_mask": causal.bool(), "need_weights": False, "is_causal": True},
        {"attn_mask": torch.randn(batch * 4, queries, keys)},
        {"key_padding_mask": torch.arange(keys).expand(batch, -1) > 4},
        {"key_padding_mask": torch.randn(batch, keys), "attn_mask": torch.randn(queries, keys), "need_weights": False},
    ]
    for given in masks:
        args = (x, memory, values) if first else tuple(each.transpose(0, 1) for each in (x, memory, values))
        for got, want in zip(split(*args, **given), attention(*args, **given), strict=True):
            assert (got is None) == (want is None)
            assert want is None or (got.shape == want.shape and torch.allclose(got, want, atol=1e-6)), given
    got, want = split(x[0], memory[0], values[0]), attention(x[0], memory[0], values[0])
    assert torch.allclose(got[0], want[0], atol=1e-6) and torch.allclose(got[1], want[1], atol=1e-6)
    back = split.dense({name: (part.weight, part.bias) for name, part in split.parts.items()})
    assert type(back) is nn.MultiheadAttention
    assert back.state_dict().keys() == attention.state_dict().keys()
    assert all(torch.equal(back.state_dict()[name], value) for name, value in attention.state_dict().items())
    with pytest.raises(ZeroskipError, match="is_causal is a hint"):
        split(x, memory, values, is_causal=True)


def test_attention_with_keys_of_its_own_stays() -> None:
    for more in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        assert SplitAttention.obstacle(nn.MultiheadAttention(8, 2, **more)) == "it adds keys and values of its own"
    assert SplitAttention.obstacle(nn.MultiheadAttention(8, 2)) is None


class Attending(nn.Module):
    """An encoder, which torch runs through one fused call, and attention to what it gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.cross = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        memory = self.encoder(x, src_key_padding_mask=padding)
        y: Tensor = self.cross(x, memory, memory, key_padding_mask=padding)[0]
        return y


X = correlated((3, 7, 32), 0)


@pytest.mark.usefixtures("sparse")
def test_attention_is_packed_inside_an_encoder_too(tmp_path: Path) -> None:
    dense = thin(Attending().eval())
    want, padding = dense(X), torch.arange(7).expand(3, -1) >= torch.tensor([[7], [5], [3]])
    masked = dense(X, padding)
    model = compile(thin(Attending().eval()), tokens=(1,), example_inputs=X)
    for layer in model.encoder.layers:
        assert isinstance(layer.self_attn, SplitAttention) and isinstance(layer.linear1, PackedLinear)
        assert isinstance(layer.self_attn.in_proj_weight, PackedStack)
        assert isinstance(layer.self_attn.out_proj, PackedLinear)
    with torch.inference_mode():
        assert close(model(X), want, 1e-5)
        keep = ~padding
        assert close(model(X, padding)[keep], masked[keep], 1e-5)
    names = {site.name: site for site in plan_of(model).sites}
    assert {"cross.in_proj_weight", "cross.out_proj", "encoder.layers.0.self_attn.in_proj_weight"} <= names.keys()
    row = names["cross.in_proj_weight"]
    assert row.shape == (32, 32) and row.bytes_before == 3 * 32 * 32 * 4
    assert row.bytes_after == model.cross.in_proj_weight.weight.nbytes
    assert "the whole layer is" in row.reason
    assert torch.equal(copy.deepcopy(model)(X), model(X))

    save(model, tmp_path / "m")
    again = load(tmp_path / "m", model=Attending())
    assert torch.equal(again.eval()(X), model(X))
    plan_of(model).save(tmp_path / "plan.json")
    applied = compile(thin(Attending().eval()), tokens=(1,), plan=Plan.load(tmp_path / "plan.json"))
    assert torch.equal(applied(X), model(X))
    parts = {f"encoder.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "linear1", "linear2")}
    assert set(thaw(again)) == {"cross", *parts}
    assert type(again.cross) is nn.MultiheadAttention
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), dense.parameters(), strict=True))
    with torch.inference_mode():
        assert close(again(X), want, 1e-6)


@pytest.mark.usefixtures("sparse")
def test_without_examples_it_stays() -> None:
    model = compile(thin(Attending().eval()), tokens=(1,))
    assert type(model.cross) is nn.MultiheadAttention
    assert any("cross.out_proj: stays dense, the size of its input" in note for note in plan_of(model).notes)


def test_a_layer_that_is_slower_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, prefer("bitmask", "torch"), WON)
    monkeypatch.setattr(recurrent, "race", measure.race)
    model = compile(thin(Attending().eval()), tokens=(1,), example_inputs=X)
    assert type(model.cross) is nn.MultiheadAttention
    reason = next(site.reason for site in plan_of(model).sites if site.name == "cross.out_proj")
    assert "torch's own layer is faster than one product after another (0.20x)" in reason
    # What torch computes in one call with the attention stays with it.
    assert all(type(layer.linear1) is nn.Linear for layer in model.encoder.layers)
    reason = next(site.reason for site in plan_of(model).sites if site.name == "encoder.layers.1.linear2")
    assert reason.startswith("its nn.TransformerEncoderLayer computes with it itself")


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, num_experts=6,
        num_experts_per_tok=2, decoder_sparse_step=1,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


EXPERTS = {**{kind: MIXTURES[kind] for kind in ("mixtral", "gpt_oss")}, "qwen3_moe": qwen3_moe}
IDS = torch.arange(24).view(2, 12) * 7 % 96


@pytest.mark.usefixtures("sparse")
@pytest.mark.parametrize("kind", list(EXPERTS))
def test_experts_are_packed(kind: str, tmp_path: Path) -> None:
    dense, ids = thin(EXPERTS[kind]()), IDS
    model = copy.deepcopy(dense)
    compile(model, tokens=(1, 8))
    found = [module for module in model.modules() if isinstance(module, SplitExperts)]
    assert found and all(isinstance(part, PackedStack) for module in found for part in module.parts.values())
    with torch.inference_mode():
        for batch in (ids, ids[:1, :1]):
            assert close(model(batch).logits, dense(batch).logits, 2e-5)
        row = next(site for site in plan_of(model).sites if site.name.endswith("down_proj") and "experts" in site.name)
        module = found[0].get_submodule("down_proj")
        count = len(module.sizes)
        assert row.bytes_before == count * row.shape[0] * row.shape[1] * 4 and row.bytes_after == module.weight.nbytes
        want = model(ids).logits
        save(model, tmp_path / "m")
        again = load(tmp_path / "m")
        assert torch.equal(again(ids).logits, want)
        thaw(again)
        for name, value in dense.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
    path = tmp_path / "m" / "config.json"
    info = json.loads(path.read_text())
    sites = info["quantization_config"]["sites"]
    name, site = next((name, site) for name, site in sites.items() if "stack" in site)
    for change, problem in (
        ({"stack": site["stack"][1:]}, "stack has"),
        ({"stack": [site["nbytes"]]}, "stored as 1 where the model has"),
        ({"stack": "all"}, "stack 'all' is not positive multiples of 64"),
    ):
        sites[name] = site | change
        path.write_text(json.dumps(info))
        with pytest.raises(ZeroskipError, match=problem):
            load(tmp_path / "m")


def test_experts_of_another_kind_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE, WON)
    monkeypatch.setattr(recurrent, "race", measure.race)
    model = compile(thin(MIXTURES["llama4"]()), tokens=(1,))
    assert not any(isinstance(module, SplitExperts) for module in model.modules())
    notes = "\n".join(plan_of(model).notes)
    assert "experts.down_proj: stays dense, Llama4TextExperts computes in a way of its own" in notes


@torch.inference_mode()
def test_a_stack_wherever_its_blobs_lie() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 24, 40, generator=draw) * (torch.rand(3, 24, 40, generator=draw) < 0.4)
    bias = torch.randn(3, 24, generator=draw)
    stack, dense = PackedStack.of([pack(each, "csr") for each in weight], bias), Stack(weight, bias)
    x = torch.randn(5, 40, generator=draw)
    for i in range(3):
        want = x.double() @ weight[i].double().t() + bias[i].double()
        assert close(stack(x, i).double(), want, 1e-5) and close(dense(x, i).double(), want, 1e-5)
    shifted = torch.empty(stack.weight.numel() + 1, dtype=torch.int8)[1:]
    shifted.copy_(stack.weight)
    moved = copy.deepcopy(stack)
    moved.weight = nn.Parameter(shifted, requires_grad=False)
    assert all(torch.equal(moved(x, i), stack(x, i)) for i in range(3))
    assert moved.half().weight.dtype == torch.int8

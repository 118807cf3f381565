"""Attention and norms of compiled language models: what transformers computes, and its own way where it must be."""

import copy
import io
from collections import Counter

import pytest
import tiny_models
import torch
from decoders import compiled_steps
from torch import nn

from zeroskip import decode_ops, hf_attention, norm_layers
from zeroskip.hf_attention import attach_attention, detach_attention
from zeroskip.norm_layers import attach_norms, constants_of, detach_norms

transformers = pytest.importorskip("transformers")

IDS = torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(1))


def mistral():
    config = transformers.MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=256, sliding_window=5,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config).eval()


MODELS = {"llama": tiny_models.llama, "gemma3": tiny_models.gemma3, "mistral": mistral, "gpt2": tiny_models.gpt2}


@pytest.fixture
def calls(monkeypatch):
    """Count what reaches the kernels."""
    count = Counter()

    def counted(name, function):
        def call(*args):
            count[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(hf_attention, "attend", counted("attend", hf_attention.attend))
    monkeypatch.setattr(norm_layers, "normalise_plain", counted("norm", norm_layers.normalise_plain))
    return count


def attached(make):
    model = make()
    for _ in range(2):
        attach_attention(model)
        attach_norms(model)
    return model


def steps(model, ids, mask=None, count=9):
    """The logits of a prompt and of the steps after it, along one and the same line of tokens."""
    told, cache = [], None
    mask = torch.ones_like(ids) if mask is None else mask
    for place in range(count):
        out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, (ids[:, -1:] * 7 + place) % 90 + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        told.append(out.logits[:, -1])
    return torch.stack(told)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_steps_give_what_transformers_gives(name, padded, calls):
    mask = torch.ones_like(IDS)
    if padded:
        mask[0, :3] = 0
    ours, theirs = attached(MODELS[name]), MODELS[name]()
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(steps(ours, IDS, mask), steps(theirs, IDS, mask), atol=2e-5, rtol=2e-5)
    assert calls["attend"] == 8 * ours.config.num_hidden_layers
    assert bool(calls["norm"]) == (name != "gpt2")


@pytest.mark.parametrize(
    "how", [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=lambda how: str(*how)
)
def test_generate_gives_the_same_tokens(how):
    told = []
    for model in (tiny_models.llama(), attached(tiny_models.llama)):
        model.generation_config.eos_token_id = None
        ids = IDS.clone()
        ids[0, :2] = 0
        mask = (ids != 0).long()
        told.append(model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0, **how))
    assert torch.equal(*told)


def test_what_is_out_of_the_ordinary_goes_transformers_way(calls):
    model = attached(tiny_models.llama)
    theirs = tiny_models.llama()
    with torch.no_grad():
        ours_cache, cache = (m(IDS, use_cache=True).past_key_values for m in (model, theirs))
        calls.clear()
        additive = torch.zeros(2, 1, 1, 8)
        additive[0, 0, 0, :4] = -1e9
        one = model(IDS[:, :1], past_key_values=copy.deepcopy(ours_cache), attention_mask=additive).logits
        other = theirs(IDS[:, :1], past_key_values=copy.deepcopy(cache), attention_mask=additive).logits
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
        assert not calls["attend"] and calls["norm"]
        from torch.utils._python_dispatch import TorchDispatchMode

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))

        calls.clear()
        with Watch():
            model(IDS[:, :1], past_key_values=copy.deepcopy(ours_cache))
        assert not calls
        theirs(IDS[:, :1], past_key_values=cache)  # in the same process, and not attached
        assert not calls
    model(IDS[:, :1]).logits.sum().backward()
    assert not calls
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert model.model.norm.weight.grad.abs().sum() > 0
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(IDS[:, :1], past_key_values=ours_cache)
    assert calls["norm"] and not calls["attend"]


def test_a_step_under_torch_compile():
    model, theirs = attached(tiny_models.llama), tiny_models.llama()
    with torch.no_grad():
        assert [place for place, _ in compiled_steps(model, theirs, IDS)] == [7, 8, 9]


def test_attached_models_are_copied_stored_and_taken_back(calls):
    model = attached(tiny_models.gemma3)
    before = model.state_dict()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    with torch.no_grad():
        want = steps(tiny_models.gemma3(), IDS)
        for copied in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
            calls.clear()
            torch.testing.assert_close(steps(copied, IDS), want, atol=2e-5, rtol=2e-5)
            assert calls["attend"] and calls["norm"]
            assert list(copied.state_dict()) == list(before)
    detach_attention(model)
    detach_norms(model)
    calls.clear()
    steps(model, IDS)
    assert not calls and {type(m) for m in model.modules()} == {type(m) for m in tiny_models.gemma3().modules()}


class TinyRMSNorm(nn.Module):
    def __init__(self, width=24, how="plain", dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, generator=torch.Generator().manual_seed(2)).to(dtype))
        self.eps, self.how = 1e-5, how

    def forward(self, x):
        wide = x.float()
        mean = (wide - wide.mean(-1, keepdim=True) if self.how == "centred" else wide).pow(2).mean(-1, keepdim=True)
        eps = 1e-3 if self.how == "other eps" else self.eps
        y = (wide * torch.rsqrt(mean + eps)).to(x.dtype)
        if self.how == "offset":
            return (1 + self.weight) * y
        return (y * self.weight, y) if self.how == "two" else y * self.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_is_known_by_what_it_computes(dtype):
    assert constants_of(TinyRMSNorm(dtype=dtype)) == (1e-5, 0.0)
    assert constants_of(TinyRMSNorm(how="offset", dtype=dtype)) == (1e-5, 1.0)


def test_what_is_no_such_norm_stays():
    for how in ("centred", "other eps", "two"):
        assert constants_of(TinyRMSNorm(how=how)) is None
    named = type("Norm", (TinyRMSNorm,), {})()
    biased, patched, wide = TinyRMSNorm(), TinyRMSNorm(), TinyRMSNorm(dtype=torch.float64)
    biased.bias = nn.Parameter(torch.ones(24))
    patched.forward = lambda x: x
    for module in (named, biased, patched, wide, nn.LayerNorm(24), nn.Linear(4, 4)):
        assert constants_of(module) is None
        attach_norms(module)
        assert norm_layers.CONSTANTS not in module.__dict__


def test_a_norm_in_one_call_has_the_values_of_its_own(calls):
    norm, plain = TinyRMSNorm(), TinyRMSNorm()
    attach_norms(norm)
    calls.clear()
    assert isinstance(norm, TinyRMSNorm) and repr(norm) == repr(plain)
    x = torch.randn(2, 3, 24)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), plain(x), atol=1e-6, rtol=1e-6)
        assert calls.pop("norm") == 1
        torch.testing.assert_close(norm(x=x), plain(x))
        torch.testing.assert_close(norm(x.double()), plain(x.double()))
        norm.weight.fill_(2)
        plain.weight.fill_(2)
        torch.testing.assert_close(norm(x), plain(x), atol=1e-6, rtol=1e-6)
    calls.clear()
    norm(x).sum().backward()
    assert norm.weight.grad is not None and not calls
    assert decode_ops.can_normalise(x, norm.weight)

"""Decoder layers whose step is a row of kernel calls: every bit of their own forward, and that where it must be."""

import copy
import io

import pytest
import torch
import transformers
from decoders import IDS, MODELS, attached, made, steps
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from zeroskip.decoder_parts import parts_of
from zeroskip.decoder_stepper import STEP
from zeroskip.hf_attention import detach_attention
from zeroskip.hf_layers import attach_layers, detach_layers

# Of 2; sliding caches are transformers' own, and Olmo2 turns in fp32 whatever the dtype.
STEPS_A_TOKEN = {"Gemma3Text": 1, "Olmo2": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_has_the_bits_of_the_layers_own_forward(name, dtype, calls):
    padded = torch.ones_like(IDS)
    padded[0, :3] = 0
    model, theirs = attached(name, dtype), made(name, dtype)
    for ids, mask in ((IDS, None), (IDS, padded), (IDS[:1], None)):
        with torch.inference_mode():
            calls[0] = 0
            assert torch.equal(steps(model, ids, mask), steps(theirs, ids, mask))
            fewer = name == "Gemma3Text" or dtype is not torch.float32
            assert calls[0] == 8 * (STEPS_A_TOKEN.get(name, 2) if fewer else 2)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda how: str(*how),
)
def test_generate_gives_the_same_tokens(how, calls):
    ids = IDS[:1] if "prompt_lookup_num_tokens" in how else IDS
    told = [
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=80,
            do_sample=False,
            **how,
        )
        for model in (attached(), made())
    ]
    assert torch.equal(*told)
    assert bool(calls[0]) == (how.keys() <= {"num_beams", "prompt_lookup_num_tokens"})


def test_what_is_out_of_the_ordinary_takes_the_layers_own_forward(calls):
    model, theirs = attached(), made()
    with torch.no_grad():
        cache, other = (m(IDS, use_cache=True).past_key_values for m in (model, theirs))

        def same(**more):
            ours = model(IDS[:, :1], past_key_values=copy.deepcopy(cache), **more)
            want = theirs(IDS[:, :1], past_key_values=copy.deepcopy(other), **more)
            assert torch.equal(ours.logits, want.logits)
            return ours, want

        same()
        assert calls[0] == 2
        calls[0] = 0
        additive = torch.zeros(2, 1, 1, 8)
        additive[0, 0, 0, :4] = -1e9
        same(attention_mask=additive)

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))

        with Watch():
            same()
        with torch.enable_grad():
            same()
        seen = []
        part = model.model.layers[0].mlp.down_proj
        for hook in (
            part.register_forward_hook(lambda *given: seen.append("after")),
            part.register_forward_pre_hook(lambda *given: seen.append("before")),
            nn.modules.module.register_module_forward_hook(lambda *given: seen.append("all")),
        ):
            seen.clear()
            calls[0] = 0
            same()
            assert seen and calls[0] <= 1  # the other layer has no hook
            hook.remove()
        calls[0] = 0
        part.forward = lambda x: type(part).forward(part, x)
        same()
        assert calls[0] == 1
        del part.forward
        calls[0] = 0
        model.train(), theirs.train()
        same()
        model.eval(), theirs.eval()
        assert not calls[0]
        static = [transformers.StaticCache(config=m.config, max_cache_len=16) for m in (model, theirs)]
        for which, held in zip((model, theirs), static, strict=True):
            which(IDS, past_key_values=held)
            which(IDS[:, :1], past_key_values=held)
        assert torch.equal(static[0].layers[1].keys, static[1].layers[1].keys) and not calls[0]
        ours, want = same(output_hidden_states=True)
        assert len(ours.hidden_states) == 3
        assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, want.hidden_states, strict=True))
        calls[0] = 0
        for which in (model, theirs):
            which.set_attn_implementation("eager")
        ours, want = same(output_attentions=True)
        assert len(ours.attentions) == 2 and not calls[0]


def test_parts_that_were_replaced_are_found_anew(calls):
    model, theirs = attached(), made()
    with torch.inference_mode():
        steps(model, IDS)
        for change in ("dense", "packed", "weights"):
            for each in (model, theirs):
                layer = each.model.layers[1]
                if change == "dense":
                    kept = layer.mlp.up_proj
                    layer.mlp.up_proj = nn.Linear(48, 80, bias=False)
                    layer.mlp.up_proj.weight.copy_(torch.linspace(-0.2, 0.3, 48 * 80).view(80, 48))
                    layer.__dict__["kept"] = kept
                elif change == "packed":
                    layer.mlp.up_proj = copy.deepcopy(layer.__dict__["kept"])
                else:
                    attention = each.model.layers[0].self_attn
                    attention.v_proj.weight.copy_(attention.k_proj.weight)
                    layer.input_layernorm.weight.mul_(0.5)
            calls[0] = 0
            assert torch.equal(steps(model, IDS), steps(theirs, IDS))
            assert calls[0] == (8 if change == "dense" else 16)
        model.to(torch.bfloat16), theirs.to(torch.bfloat16)
        calls[0] = 0
        assert torch.equal(steps(model, IDS), steps(theirs, IDS)) and calls[0] == 16


@pytest.mark.parametrize("change", ["weight moved", "norm moved", "bias in place", "bias replaced"])
def test_parameters_are_where_they_are_now(calls, change):
    """What is remembered of a layer's parameters is what they are: moved, cast and written over, they are seen."""
    model, theirs = attached(), made()
    with torch.inference_mode():
        for each in (model, theirs):
            biased = each.model.layers[1].mlp.down_proj
            biased.register_parameter("bias", nn.Parameter(torch.linspace(-1, 1, 48).half(), requires_grad=False))
        steps(model, IDS)
        for each in (model, theirs):
            layer = each.model.layers[1]
            norm, up, gate = layer.input_layernorm.weight, layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight
            if change == "weight moved":
                up.data = gate.data.clone()
            elif change == "norm moved":
                norm.data = norm.data * 0.5
            elif change == "bias in place":
                layer.mlp.down_proj.bias.mul_(2)
            else:
                layer.mlp.down_proj.bias = nn.Parameter(torch.ones(48), requires_grad=False)
        calls[0] = 0
        assert torch.equal(steps(model, IDS), steps(theirs, IDS)) and calls[0]


def louder(kind):
    class Louder(kind):
        def forward(self, hidden_states, **kwargs):
            return 1.5 * super().forward(hidden_states, **kwargs)

    return Louder


def test_a_layer_that_does_not_do_what_its_names_say_is_found_out(calls):
    model, theirs = made(), made()
    for each in (model, theirs):
        first, second = each.model.layers
        first.__class__ = louder(type(first))
        second.self_attn.scaling = 0.7
    attach_layers(model)
    with torch.inference_mode():
        assert torch.equal(steps(model, IDS), steps(theirs, IDS))
    assert calls[0] == 8  # the second layer's scale is as it says


def test_layers_with_other_parts_are_left_alone():
    model = made()
    first, second = model.model.layers
    first.extra = nn.Linear(2, 2)
    second.mlp.act_fn = nn.SiLU()
    attach_layers(model)
    assert not any(STEP in module.__dict__ for module in model.modules())
    for name in ("GPT2", "Phi", "OPT"):
        config = getattr(transformers, f"{name}Config")()
        with torch.device("meta"):
            other = transformers.AutoModelForCausalLM.from_config(config)
        assert all(parts_of(module) is None for module in other.modules())


def test_attached_layers_are_copied_stored_and_taken_back(calls):
    model, theirs = attached(), made()
    kinds = [type(module).__name__ for module in theirs.modules()]
    with torch.inference_mode():
        want = steps(theirs, IDS)
        assert torch.equal(steps(model, IDS), want)
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        for copied in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
            calls[0] = 0
            assert torch.equal(steps(copied, IDS), want) and calls[0] == 16
            assert list(copied.state_dict()) == list(theirs.state_dict())
            assert isinstance(copied.model.layers[0], type(theirs.model.layers[0]))
            assert [type(module).__name__ for module in copied.modules()] == kinds
        detach_layers(model)
        calls[0] = 0
        assert torch.equal(steps(model, IDS), want) and not calls[0]
        assert {type(m) for m in model.model.layers} == {type(m) for m in theirs.model.layers}
        attach_layers(model)
        detach_attention(model)
        steps(model, IDS)
        assert not calls[0]

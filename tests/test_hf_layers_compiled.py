"""A decoder layer under torch.compile: one op, whose arguments are checked."""

import copy

import pytest
import torch
import transformers
from decoders import IDS, attached, compiled_steps, made
from torch import nn

from zeroskip import decoder_step
from zeroskip.decoder_parts import parts_of
from zeroskip.errors import ZeroskipError


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_a_step_under_torch_compile_is_one_op_a_layer(name, monkeypatch):
    model, theirs, made_of = attached(name), made(name), []
    run = decoder_step.run  # of the op; its third list has the token at its third place
    monkeypatch.setattr(
        decoder_step,
        "run",
        lambda made: made_of.extend(call[2][2] for call in made) or run(made),
    )
    with torch.no_grad():
        for place, both in compiled_steps(model, theirs, IDS):
            caches = both
            assert made_of == [place] * 2
            made_of.clear()
        for one, other in zip(*(cache.layers for cache in caches), strict=True):
            torch.testing.assert_close(one.keys, other.keys, atol=2e-5, rtol=2e-5)
            assert int(one.cumulative_length) == int(other.cumulative_length) == 10
        torch.compiler.reset()
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *given: None)
        compiled = torch.compile(model, backend="aot_eager")
        where = {"position_ids": torch.full((2, 1), 10), "use_cache": True}
        ours = compiled(IDS[:, :1], past_key_values=caches[0], **where).logits
        want = theirs(IDS[:, :1], past_key_values=caches[1], **where).logits
        torch.testing.assert_close(ours, want, atol=2e-5, rtol=2e-5)
        assert made_of == [10]  # of the other layer
    torch.compiler.reset()


def test_the_op_is_traced_and_checked():
    layer = attached("Qwen2").model.layers[0]
    step = decoder_step.DecoderStep(parts_of(layer))
    draw = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(2, 1, n, generator=draw) for n in (48, 12, 12))
    keys, values = (torch.randn(2, 2, 5, 12, generator=draw) for _ in range(2))
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    with torch.no_grad():
        for token, each in ((3, None), (4, mask)):
            given_ = [
                x,
                cos,
                sin,
                keys.clone(),
                values.clone(),
                torch.tensor(token),
                each,
                step.number,
            ]
            torch.library.opcheck(
                torch.ops.zeroskip.decode.default,
                tuple(given_),
                test_utils=("test_schema", "test_faketensor"),
            )
        wrong = {
            0: [x[:, :, :40], x[0], x.double(), x.expand(2, 3, 48)],
            1: [cos[..., :6], cos.half(), cos[:, :0]],
            3: [keys[:1], keys[..., :6], keys.half(), keys.transpose(2, 3)],
            5: [torch.tensor(5), torch.tensor(-1)],
            6: [mask.float(), mask[..., :3], mask.expand(2, 4, 1, 5)],
        }
        for index, values_ in wrong.items():
            for value in values_:
                given_ = [x, cos, sin, keys, values, torch.tensor(3), mask, step.number]
                given_[index] = value
                with pytest.raises(ZeroskipError, match="do not fit the layer"):
                    torch.ops.zeroskip.decode(*given_)
        given_ = [x, cos, sin, keys, values, torch.tensor(3), mask]
        with pytest.raises(ZeroskipError, match="no layer -1 any more"):
            torch.ops.zeroskip.decode(*given_, -1)
        number = step.number
        del step
        with pytest.raises(ZeroskipError, match=f"no layer {number} any more: compile the model anew"):
            torch.ops.zeroskip.decode(*given_, number)


def test_what_was_compiled_takes_the_weights_that_are_there():
    """Also those of a copy, and those that took another's place after compiling or for the time of a call."""
    model = attached("Qwen2")
    where = {"position_ids": torch.full((2, 1), 7), "use_cache": True}

    def step(which, forward):
        cache = transformers.StaticCache(config=which.config, max_cache_len=16)
        which(IDS, past_key_values=cache)
        return forward(IDS[:, :1], past_key_values=cache, **where).logits

    def same(which):
        forward = torch.compile(which, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(step(which, forward), step(which, which), atol=2e-5, rtol=2e-5)
        return forward

    with torch.no_grad():
        forward = same(model)
        copied = copy.deepcopy(model)
        copied.model.layers[0].self_attn.v_proj.weight.copy_(copied.model.layers[0].self_attn.k_proj.weight)
        copied.model.layers[1].input_layernorm.weight.mul_(0.5)
        same(copied)
        want = step(copied, copied)
        for change in ("in place", "replaced"):
            layers = model.model.layers
            if change == "in place":
                layers[1].input_layernorm.weight.mul_(0.5)
            else:
                attention = layers[0].self_attn
                attention.v_proj.weight = nn.Parameter(attention.k_proj.weight.clone(), requires_grad=False)
            ours = step(model, forward)
            torch.testing.assert_close(ours, step(model, model), atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(ours, want, atol=2e-5, rtol=2e-5)
        own = dict(model.named_parameters())
        for name, value in (
            ("model.layers.1.mlp.up_proj.weight", own["model.layers.1.mlp.gate_proj.weight"]),
            ("model.layers.1.self_attn.q_proj.bias", own["model.layers.1.self_attn.q_proj.bias"] + 1),
        ):
            swapped = own | {name: value}

            def other(*args, swapped=swapped, **kwargs):
                return torch.func.functional_call(model, swapped, args, kwargs)

            compiled = torch.compile(other, backend="aot_eager")
            torch.testing.assert_close(step(model, compiled), step(model, other), atol=2e-5, rtol=2e-5)
    torch.compiler.reset()

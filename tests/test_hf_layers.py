"""Decoder layers whose step is a row of kernel calls: every bit of their own forward, and that where it must be."""

import copy
import gc
import io
import weakref

import pytest
import torch
import transformers
from io_models import pack_sites
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from zeroskip import decoder_step, decoder_stepper
from zeroskip.decoder_parts import parts_of
from zeroskip.decoder_stepper import STEP
from zeroskip.errors import ZeroskipError
from zeroskip.hf_attention import attach_attention, detach_attention
from zeroskip.hf_cache import attach_cache
from zeroskip.hf_layers import attach_layers, detach_layers
from zeroskip.planning.folding import find_foldable, fold

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "Llama": SIZES,
    "Qwen2": SIZES,
    "Qwen3": SIZES,
    "Mistral": SIZES | {"sliding_window": None},
    "Olmo2": SIZES,
    "Gemma3Text": SIZES | SLIDING,
}
# Of 2; sliding caches are transformers' own, and Olmo2 turns in fp32 whatever the dtype.
STEPS_A_TOKEN = {"Gemma3Text": 1, "Olmo2": 0}
IDS = torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(1))


def made(name="Llama", dtype=torch.float32, layers=2):
    """A model packed as compiling would, with all but its layers attached."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name] | {"num_hidden_layers": layers})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    pack_sites(model, kinds=("dense",))
    attach_cache(model)
    attach_attention(model)
    fold(model, find_foldable(model, lambda: model(IDS)))
    return model


def attached(name="Llama", dtype=torch.float32, layers=2):
    model = made(name, dtype, layers)
    for _ in range(2):
        attach_layers(model)
    return model


@pytest.fixture
def calls(monkeypatch):
    """Count the layers that the core computed, but for trials."""
    count, trying, run, tried = (
        [0],
        [0],
        decoder_stepper.run,
        decoder_stepper.Stepper._try,
    )

    def counted(made):
        count[0] += 0 if trying[0] else len(made)
        run(made)

    def trial(self, *args):
        trying[0] += 1
        try:
            return tried(self, *args)
        finally:
            trying[0] -= 1

    monkeypatch.setattr(decoder_stepper, "run", counted)
    monkeypatch.setattr(decoder_stepper.Stepper, "_try", trial)
    return count


def steps(model, ids, mask=None, count=9, **more):
    """The logits of a prompt and of the steps after it, along one and the same line of tokens."""
    told, cache = [], None
    mask = torch.ones_like(ids) if mask is None else mask
    for place in range(count):
        out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
        cache, ids = out.past_key_values, (ids[:, -1:] * 7 + place) % 90 + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        told.append(out.logits[:, -1])
    return torch.stack(told)


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
        caches = [transformers.StaticCache(config=m.config, max_cache_len=16) for m in (model, theirs)]
        for each, cache in zip((model, theirs), caches, strict=True):
            each(IDS, past_key_values=cache)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for place in range(7, 10):
            where = {"position_ids": torch.full((2, 1), place), "use_cache": True}
            ours = compiled(IDS[:, :1], past_key_values=caches[0], **where).logits
            want = theirs(IDS[:, :1], past_key_values=caches[1], **where).logits
            torch.testing.assert_close(ours, want, atol=2e-5, rtol=2e-5)
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
    own = [product._parameters for product in step.parts.products]
    norms = [None if norm is None else norm.weight.detach() for norm in step.parts.all_norms]
    rest = [
        [o["weight"] for o in own],
        [o["bias"] for o in own],
        norms,
        *map(list, step.constants()),
    ]
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
                *rest,
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
            7: [rest[0][:6], [o.float() for o in rest[0]]],
            8: [rest[1][:3]],
        }
        for index, values_ in wrong.items():
            for value in values_:
                given_ = [x, cos, sin, keys, values, torch.tensor(3), mask, *rest]
                given_[index] = value
                with pytest.raises(ZeroskipError, match="do not fit the layer"):
                    torch.ops.zeroskip.decode(*given_)
        for index, value, told in (
            (7, [*rest[0][1:], rest[0][0]], "packed weight is"),
            (10, rest[3][:-1], "too few sizes"),
        ):
            given_ = [x, cos, sin, keys, values, torch.tensor(3), mask, *rest]
            given_[index] = value
            with pytest.raises(ZeroskipError, match=told):
                torch.ops.zeroskip.decode(*given_)


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


def louder(kind):
    class Louder(kind):
        def forward(self, hidden_states, **kwargs):
            return 1.5 * super().forward(hidden_states, **kwargs)

    return Louder


def test_layers_are_computed_ahead_only_while_they_are_called_in_turn(calls, monkeypatch):
    model, theirs = attached(layers=4), made(layers=4)
    sizes, run = [], decoder_stepper.run
    monkeypatch.setattr(decoder_stepper, "run", lambda made: sizes.append(len(made)) or run(made))
    with torch.inference_mode():
        assert torch.equal(steps(model, IDS, count=4), steps(theirs, IDS, count=4))
        assert sizes[-6:] == [
            1,
            1,
            1,
            1,
            4,
            4,
        ]  # seen to follow one another, then together
        other = attached(layers=4)
        one, two = steps(model, IDS, count=3), steps(other, IDS, count=3)
        assert torch.equal(one, two) and sizes[-1] == 4
        for each in (model, theirs):
            each.model.layers[1].register_forward_hook(lambda module, args, y: 2 * y)
        for _ in range(2):  # the third layer gets something else: nothing computed ahead is used, or counted
            sizes.clear()
            assert torch.equal(steps(model, IDS, count=4), steps(theirs, IDS, count=4))
        assert max(sizes) == 2 and not decoder_stepper._here.ahead
        cache, other = (m(IDS, use_cache=True).past_key_values for m in (model, theirs))
        kept = model.model.layers
        for _ in range(2):  # a step that ends early
            model.model.layers = kept[:1]
            theirs.model.layers, whole = theirs.model.layers[:1], theirs.model.layers
            assert torch.equal(
                model(IDS[:, :1], past_key_values=cache).logits,
                theirs(IDS[:, :1], past_key_values=other).logits,
            )
            assert cache.layers[1].keys.shape[2] == 7 and cache.layers[0].keys.shape[2] > 7
            model.model.layers, theirs.model.layers = kept, whole


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_was_computed_ahead_is_dropped_once_something_wrote_into_its_input(mode, calls):
    model, theirs = attached(layers=4), made(layers=4)
    with mode():
        assert torch.equal(steps(model, IDS, count=4), steps(theirs, IDS, count=4))  # from here on computed together
        for each in (model, theirs):
            each.model.layers[1].register_forward_hook(lambda module, args, y: y.mul_(2))
        for _ in range(2):
            assert torch.equal(steps(model, IDS, count=4), steps(theirs, IDS, count=4))


def test_nothing_of_a_step_is_kept_alive():
    model = attached()
    with torch.inference_mode():
        cache = model(IDS, use_cache=True).past_key_values
        for _ in range(3):
            model(IDS[:, :1], past_key_values=cache)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


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


def test_caches_are_cut_reordered_and_continued_twice(calls):
    model, theirs = attached(), made()
    with torch.inference_mode():
        cache, other = (m(IDS, use_cache=True).past_key_values for m in (model, theirs))
        for change in (
            lambda held: held,
            copy.deepcopy,
            lambda held: (held.crop(-2), held)[1],
            lambda held: (held.reorder_cache(torch.tensor([1, 0])), held)[1],
        ):
            cache, other = change(cache), change(other)
            for _ in range(3):
                one = model(IDS[:, :1], past_key_values=cache).logits
                assert torch.equal(one, theirs(IDS[:, :1], past_key_values=other).logits)
        kept = copy.deepcopy(cache)
        keys = kept.layers[0].keys.clone()
        model(IDS[:, :1], past_key_values=kept)
        model(IDS[:, 1:2], past_key_values=cache)
        assert torch.equal(kept.layers[0].keys[:, :, : keys.shape[2]], keys)
    assert calls[0]

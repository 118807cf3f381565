"""Keys and values in rooms: the same as transformers' own cache, whatever is done to it, and no copies."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeroskip import hf_cache
from zeroskip.hf_cache import appended, attach_cache, give_room

transformers = pytest.importorskip("transformers")


def tiny(attached=True, **more):
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, eos_token_id=None, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    if attached:
        attach_cache(model)
        attach_cache(model)
    return model


IDS = torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True, scope="module")
def small_ones_too():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_cache, "LEAST_BYTES", 0)
        yield


@given(st.lists(st.integers(1, 90), min_size=1, max_size=8))
def test_what_is_appended_is_what_cat_would_give_and_stays(lengths):
    draw = torch.Generator().manual_seed(len(lengths))
    held, room, plain, seen = torch.tensor([]), None, None, []
    for length in lengths:
        new = torch.randn(1, 2, length, 3, generator=draw)
        held, room = appended(held, new, room)
        plain = new if plain is None else torch.cat([plain, new], 2)
        assert torch.equal(held, plain)
        seen.append((held, plain))
    assert all(torch.equal(a, b) for a, b in seen)


def test_two_that_go_on_from_one_do_not_see_each_other():
    start, room = appended(torch.tensor([]), torch.zeros(1, 1, 5, 2), None)
    one, room_of_one = appended(start, torch.ones(1, 1, 1, 2), room)
    other, room_of_other = appended(start, 2 * torch.ones(1, 1, 1, 2), room)
    assert room_of_one is room and room_of_other is not room
    assert one[0, 0, 5, 0] == 1 and other[0, 0, 5, 0] == 2
    shorter, _ = appended(one[:, :, :3], 3 * torch.ones(1, 1, 1, 2), room_of_one)
    assert shorter.shape[2] == 4 and one[0, 0, 3, 0] == 0


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "top_k": 20},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "use_cache": False},
    ],
    ids=lambda how: " ".join(how),
)
def test_generate_gives_the_same_tokens(how):
    ids = IDS[:1] if "prompt_lookup_num_tokens" in how else IDS
    told = []
    for model in (tiny(attached=False), tiny()):
        torch.manual_seed(3)
        told.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=90, pad_token_id=0, **how))
    assert torch.equal(*told)


def test_a_step_writes_behind_the_others():
    model = tiny()
    with torch.inference_mode():
        held = model(IDS, use_cache=True).past_key_values
        model(IDS[:, :1], past_key_values=held, use_cache=True)
        where = [layer.keys.data_ptr() for layer in held.layers]
        before = held.layers[0].keys
        kept = before.clone()
        for _ in range(20):
            model(IDS[:, :1], past_key_values=held, use_cache=True)
        assert [layer.keys.data_ptr() for layer in held.layers] == where
        assert torch.equal(before, kept) and held.get_seq_length() == 28


def test_generate_keeps_its_tokens_in_rooms():
    how = {"max_new_tokens": 9, "pad_token_id": 0, "return_dict_in_generate": True}
    told = tiny().generate(IDS, attention_mask=torch.ones_like(IDS), **how)
    layers = told["cache" if "cache" in told else "past_key_values"].layers
    assert layers and all(type(layer).__name__ == "RoomyLayer" and layer._rooms[0] is not None for layer in layers)


def test_a_cache_may_be_copied_stored_cut_and_used_outside_inference_mode():
    model, plain = tiny(), tiny(attached=False)

    def step(which, held):
        return which(IDS[:, :1], past_key_values=held, use_cache=True).logits

    with torch.inference_mode():
        ours, theirs = (which(IDS, use_cache=True).past_key_values for which in (model, plain))
        step(model, ours), step(plain, theirs)
    with torch.no_grad():
        for change in (
            lambda held: held,
            copy.deepcopy,
            lambda held: pickle.loads(pickle.dumps(held)),
            lambda held: (held.crop(-2), held)[1],
            lambda held: (held.reorder_cache(torch.tensor([1, 0])), held)[1],
            lambda held: (held.batch_repeat_interleave(2), held.batch_select_indices(torch.tensor([0, 2])), held)[2],
            lambda held: (held.reset(), held)[1],
        ):
            ours, theirs = change(ours), change(theirs)
            torch.testing.assert_close(step(model, ours), step(plain, theirs), atol=1e-5, rtol=1e-5)
            assert ours.get_seq_length() == theirs.get_seq_length()


def test_gradients_go_through_and_other_caches_stay():
    model = tiny()
    held = model(IDS, use_cache=True).past_key_values
    model(IDS[:, :1], past_key_values=held, use_cache=True).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    static = transformers.StaticCache(config=model.config, max_cache_len=16)
    kinds = [type(layer) for layer in static.layers]
    give_room(model, (), {"past_key_values": static})
    assert [type(layer) for layer in static.layers] == kinds
    give_room(model, (), {"past_key_values": None})
    assert sum(hook is give_room for hook in model._forward_pre_hooks.values()) == 1

"""Decoder layers that are computed ahead of their calls: used only if they are called as was expected."""

import copy
import gc
import weakref

import pytest
import torch
from decoders import IDS, attached, made, steps

from zeroskip import decoder_stepper


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

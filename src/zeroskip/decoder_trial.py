"""Whether the step of a decoder layer is what the layer computes: tried on random numbers, bit by bit.

Names promise nothing: a layer may scale, cap or turn something on the way. Two sequences, one of them padded, take one
token after a few others, by the layer's own forward and by the core; output, keys and values have to be the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zeroskip.decoder_step import DecoderStep, run
from zeroskip.hf_cache import CACHES, fill, place_of

__all__ = ["gives_the_same"]

log = logging.getLogger(__name__)

TOKENS = 3  # before the one that is tried


def gives_the_same(step: DecoderStep, theirs: Callable[..., Any], like: Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Return whether the step gives the bits of the layer's own forward.

    Parameters
    ----------
    theirs : callable
        That forward.
    like : Tensor
        What the layer is called with; its dtype is the one that is tried.
    kwargs : mapping
        The rest of that call, from which are taken those that the trial has no others for.
    """
    from transformers import DynamicCache

    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(like.dtype)

    turned = kwargs["position_embeddings"][0].shape[2]
    x, angles = random(2, 1, step.hidden), (random(2, 1, turned), random(2, 1, turned))
    held = random(2, step.groups, TOKENS, step.depth), random(2, step.groups, TOKENS, step.width)
    mask = torch.ones(2, 1, 1, TOKENS + 1, dtype=torch.bool)
    mask[1, :, :, 0] = False
    name = next(each for each in CACHES if each in kwargs)
    given = {**kwargs, "position_embeddings": angles, "attention_mask": mask}
    if kwargs.get("position_ids") is not None:
        given["position_ids"] = torch.full((2, 1), TOKENS)
    told = []
    cache: Any
    try:
        for ours in (False, True):
            given[name] = cache = DynamicCache()
            cache.update(held[0].clone(), held[1].clone(), step.index)
            y = _stepped(step, x, angles, cache, mask) if ours else theirs(x, **given)
            told.append((y, cache.layers[step.index].keys, cache.layers[step.index].values))
    except Exception as error:  # whatever else the layer wants
        log.info("a decoder layer takes its own forward: %s", error)
        return False
    same = all(
        isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b) for a, b in zip(*told, strict=True)
    )
    if not same:
        log.info("a decoder layer computes something else than its names say: it takes its own forward")
    return same


def _stepped(step: DecoderStep, x: Tensor, angles: tuple[Tensor, Tensor], cache: Any, mask: Tensor) -> Tensor | None:
    place, y = place_of(cache, step.index, x.shape[0], x.dtype), torch.empty_like(x)
    if place is None:
        return None
    call, _held = step.prepare(x, y, *angles, place, mask)
    run([call])
    fill(cache, step.index, place)
    return y

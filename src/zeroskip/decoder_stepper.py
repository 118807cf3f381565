"""The step of one decoder layer: when it may be computed by the core, whether that is right, and what goes with it.

A step is tried first, on random numbers and a padded pair of sequences: the core has to give every bit of what the
layer's own forward gives, in its output, its keys and its values. Whatever is out of the ordinary goes to that forward:
prompts, gradients, dispatch modes, hooks on any part, other attention, other caches, masks of numbers, parts that were
replaced.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from zeroskip.decoder_parts import Parts, parts_of
from zeroskip.decoder_step import DecoderStep, run
from zeroskip.decoder_trial import gives_the_same
from zeroskip.errors import ZeroskipError
from zeroskip.hf_attention import in_use
from zeroskip.hf_cache import CACHES, Place, fill, place_of
from zeroskip.native import TYPES, is_plain

__all__ = ["STEP", "Stepper", "Traced"]

log = logging.getLogger(__name__)

STEP = "zeroskip_step"
KNOWN = {*CACHES, "attention_mask", "position_ids", "use_cache", "position_embeddings"}


class Given(NamedTuple):
    """What a layer is called with, told apart by identity."""

    x: Tensor
    cache: Any
    angles: Any
    mask: Any

    def same(self, other: Given) -> bool:
        return all(a is b for a, b in zip(self, other, strict=True))

    def rest(self) -> tuple[int, ...]:
        return tuple(id(each) for each in self[1:])


class Ahead(NamedTuple):
    """What a layer will return if it is called with what is expected, its keys and values written but not counted."""

    given: Given
    version: int  # of what it is expected to be called with: nobody has written into it since
    keys: Tensor  # of the cache before
    place: Place
    y: Tensor


class Traced(NamedTuple):
    """What torch.compile has to know of a layer that was tried: which step, and of what it is that step."""

    number: int
    dtype: torch.dtype
    norm_names: tuple[str | None, ...]
    weights: tuple[Tensor | None, ...]  # of products and norms, in the order of `Parts`
    biases: tuple[Tensor | None, ...]  # of products


class Last(NamedTuple):
    """The layer that was computed last, what it returned, and the rest of what it was given; nothing is kept alive."""

    stepper: weakref.ref[Stepper]
    y: weakref.ref[Tensor]
    rest: tuple[int, ...]


class _Thread(threading.local):
    """Of one thread: layers computed ahead of their calls, and the last one computed."""

    def __init__(self) -> None:
        self.ahead: dict[Stepper, Ahead] = {}
        self.last: Last | None = None


_here = _Thread()


class Stepper:
    """What is known of one layer: its parts, for which dtypes its step was tried, and which layer follows it.

    Layers that were seen to follow one another, the next one called with the tensor that the one before returned and
    all else the same, are computed in one call when the first of them is called. The others find their result, if
    they are called with that very tensor and nothing wrote into it; else nothing has happened, for only then is their
    token counted in the cache. A copy begins anew.
    """

    def __init__(self) -> None:
        self.parts: Parts | None = None
        self.step: DecoderStep | None = None
        self.tried: dict[torch.dtype, bool] = {}
        self.next: weakref.ref[nn.Module] | None = None
        self.traced: Traced | None = None
        self.alone = False  # once it was computed ahead and not called, or with something else

    def __reduce__(self) -> tuple[type[Stepper], tuple[()]]:
        return Stepper, ()

    def __call__(
        self,
        layer: nn.Module,
        theirs: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Tensor | None:
        """Return what the layer returns, or None where its own forward has to be asked."""
        if len(args) != 1 or layer.training or torch.is_grad_enabled() or not kwargs.keys() <= KNOWN:
            return None
        x, cache = args[0], next((kwargs[name] for name in CACHES if name in kwargs), None)
        if cache is None or not is_plain(x) or x.dim() != 3 or x.dtype not in TYPES:
            return None
        angles, mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")
        made = _here.ahead.pop(self, None)
        if made is not None:
            same = made.given.same(Given(x, cache, angles, mask)) and x._version == made.version
            if same and self._counts(made):
                return made.y
            self.alone = True
        if not self._found(layer) or self.step is None or not _turns(angles, x, self.step.depth):
            return None
        known = self.tried.get(x.dtype)
        if known is None:
            known = self.tried[x.dtype] = gives_the_same(self.step, theirs, x, kwargs)
            if known:
                parts = self.step.parts
                weights = tuple(
                    None if part is None else part._parameters["weight"] for part in (*parts.products, *parts.all_norms)
                )
                biases = tuple(product._parameters["bias"] for product in parts.products)
                self.traced = Traced(self.step.number, x.dtype, parts.norm_names, weights, biases)
        return self._step(layer, Given(x, cache, angles, mask)) if known and x.shape[1] == 1 else None

    def known(self) -> DecoderStep:
        """Return the step, which is there once the parts were found to fit."""
        return cast(DecoderStep, self.step)

    def _found(self, layer: nn.Module) -> bool:
        """Return whether the parts are there and nobody watches them; look for them anew where one was replaced."""
        if self.parts is None or not self.parts.untouched():
            if self.parts is not None and self.parts.in_place():
                return False
            self.parts, self.step, self.tried, self.traced = parts_of(layer), None, {}, None
            if self.parts is None:
                return False
            try:
                self.step = DecoderStep(self.parts)
            except ZeroskipError as error:
                log.info("a %s takes its own forward: %s", type(layer).__name__, error)
            if not self.parts.untouched():
                return False
        return in_use(self.parts.attention)

    def _counts(self, made: Ahead) -> bool:
        """Count a token that was computed ahead, if the cache is what it was."""
        step: Any = self.step
        cache = made.given.cache
        if step is None or cache.layers[step.index].keys is not made.keys:
            return False
        fill(cache, step.index, made.place)
        return True

    def _place(self, x: Tensor, cache: Any, mask: Tensor | None) -> Place | None:
        """Return where the token of this layer belongs; None if it or the mask does not fit."""
        step: Any = self.step
        batch = x.shape[0]
        place = place_of(cache, step.index, batch, x.dtype)
        if place is None or x.shape[2] != step.hidden or not x.is_contiguous():
            return None
        keys, values = place.keys.shape, place.values.shape
        if keys[1] != step.groups or keys[3] != step.depth or values[1] != step.groups or values[3] != step.width:
            return None
        return place if mask is None or _masks(mask, batch, place.token + 1) else None

    def _step(self, layer: nn.Module, given: Given) -> Tensor | None:
        """Return what the layer returns, and compute those that follow it ahead."""
        x, cache, angles, mask = given
        place = self._place(x, cache, mask)
        if place is None:
            return None
        self._learn(layer, given)
        followers = self._followers(x, cache, mask, angles[0].shape[2])
        outputs = _empty_like(x, 1 + len(followers))
        told = [given, *(Given(y, cache, angles, mask) for y in outputs[:-1])]
        chain = list(zip([(self, place), *followers], told, outputs, strict=True))
        calls, held = [], []
        for (each, there), its, made in chain:
            call, lasting = each.known().prepare(its.x, made, angles[0], angles[1], there, mask)
            calls.append(call)
            held.append(lasting)
        run(calls)
        fill(cache, self.known().index, place)
        for (each, there), its, made in chain[1:]:
            _here.ahead[each] = Ahead(its, its.x._version, cache.layers[each.known().index].keys, there, made)
        (last, _), _, made = chain[-1]
        _here.last = Last(weakref.ref(last), weakref.ref(made), given.rest())
        return outputs[0]

    def _followers(self, x: Tensor, cache: Any, mask: Tensor | None, turned: int) -> list[tuple[Stepper, Place]]:
        """Return the layers to compute ahead, and where their tokens belong."""
        found: list[tuple[Stepper, Place]] = []
        taken = {self}  # a layer may be called twice in a step
        stepper = self
        while (after := stepper._follower(x.dtype)) is not None and after not in taken:
            place = after._place(x, cache, mask)
            if place is None or turned > after.known().depth:
                break
            found.append((after, place))
            taken.add(after)
            stepper = after
        return found

    def _learn(self, layer: nn.Module, given: Given) -> None:
        """See which layer this one follows; what was computed ahead and not asked for is not computed ahead again."""
        for stepper in _here.ahead:
            stepper.alone = True
        _here.ahead.clear()
        last, _here.last = _here.last, None
        before = None if last is None or last.y() is not given.x or last.rest != given.rest() else last.stepper()
        if before is not None:
            before.next = weakref.ref(layer)

    def _follower(self, dtype: torch.dtype) -> Stepper | None:
        """Return what is known of the layer after this one, if it may be computed ahead."""
        layer = None if self.next is None else self.next()
        if layer is None or layer.training:
            return None
        found: Stepper | None = layer.__dict__.get(STEP)
        if found is None or found.alone or not found.tried.get(dtype) or not found._found(layer):
            return None
        return found if found.step is not None and found.tried.get(dtype) else None


def _empty_like(x: Tensor, count: int) -> list[Tensor]:
    """Return unset tensors that count how often something writes into them, as those of inference mode do not."""
    with torch.inference_mode(False):
        return [torch.empty_like(x) for _ in range(count)]


def _turns(angles: Any, x: Tensor, depth: int) -> bool:
    """Return whether these are a cosine and a sine for each token."""
    if type(angles) is not tuple or len(angles) != 2:
        return False
    for each in angles:
        if type(each) is not Tensor or each.dtype is not x.dtype or each.dim() != 3 or not each.is_contiguous():
            return False
        if each.is_neg():
            return False
        batch, tokens, turned = each.shape
        if batch not in (1, x.shape[0]) or tokens != x.shape[1] or turned % 2 or turned > depth or not each.is_cpu:
            return False
    return bool(angles[0].shape == angles[1].shape)


def _masks(mask: Any, batch: int, tokens: int) -> bool:
    if type(mask) is not Tensor or mask.dtype is not torch.bool or mask.dim() != 4 or not mask.is_cpu:
        return False
    rows, *rest = mask.shape
    return rows in (1, batch) and rest == [1, 1, tokens] and mask.stride(3) == 1

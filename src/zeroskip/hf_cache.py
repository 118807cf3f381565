"""Keys and values of a language model in buffers with room, so that a decode step does not copy them.

transformers' growing cache makes a new tensor of all keys, and one of all values, for every token of every layer: at
1024 tokens of the 1.1 B shape 64 MB a step to read and as many to write. Here the new token is written behind the
others, and attention gets a view. Everything else of the cache is transformers' own.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["CACHES", "Place", "attach_cache", "fill", "give_room", "place_of"]

CACHES = ("cache", "past_key_values")  # its name in calls since transformers 5.24, and before
LEAST_BYTES = 1 << 17  # of all keys of a layer: below, copying them costs less than the Python around a room
STEP = 64  # tokens that a buffer grows by at least; or an eighth of what it holds


class Room:
    """A buffer [batch, heads, capacity, head_dim], and how many tokens of it anybody has written."""

    __slots__ = ("buffer", "taken")

    def __init__(self, like: Tensor, tokens: int) -> None:
        capacity = -(-(tokens + max(STEP, tokens // 8)) // STEP) * STEP
        self.buffer, self.taken = like.new_empty(*like.shape[:2], capacity, like.shape[-1]), 0


def appended(held: Tensor, new: Tensor, room: Room | None) -> tuple[Tensor, Room]:
    """Return `held` [batch, heads, tokens, head_dim] with `new` behind it, and the room that they are in.

    Nothing that anybody was given before changes: where the place behind `held` is taken, or `held` is not the
    beginning of the room (beams were put in another order, tokens were cut off), all are copied into a new one.
    """
    tokens = held.shape[-2] if held.dim() == new.dim() else 0
    end = tokens + new.shape[-2]
    room = _open(held, tokens, new, end, room)
    room.buffer[:, :, tokens:end] = new
    room.taken = end
    return room.buffer[:, :, :end], room


def _open(held: Tensor, tokens: int, like: Tensor, end: int, room: Room | None) -> Room:
    """Return the room that `held` fills up to `tokens` and that has place up to `end`: the one given, or a new one."""
    if (
        room is None
        or room.taken != tokens
        or end > room.buffer.shape[-2]
        or (tokens and held.data_ptr() != room.buffer.data_ptr())
        or room.buffer.shape[:2] != like.shape[:2]
        or room.buffer.dtype is not like.dtype
        or (room.buffer.is_inference() and not torch.is_inference_mode_enabled())
    ):
        room = Room(like, end)
        if tokens:
            room.buffer[:, :, :tokens] = held
        room.taken = tokens
    return room


class Place(NamedTuple):
    """Where one more token of each sequence belongs: `keys` and `values` [batch, heads, capacity, head_dim]."""

    keys: Tensor
    values: Tensor
    token: int


def place_of(cache: Any, index: int, batch: int, dtype: torch.dtype) -> Place | None:
    """Return where the next token of a layer belongs, if its keys and values lie in rooms or may: else None.

    Parameters
    ----------
    cache : transformers.Cache
        Modified: its layer has rooms afterwards. `fill` says that the token was written.
    index : int
        Of the layer.
    batch, dtype
        Of the token.
    """
    kinds: Any = _roomy()
    plain, roomy = kinds
    layers = getattr(cache, "layers", ())
    if type(cache).__name__ != "DynamicCache" or getattr(cache, "offloading", True) or index >= len(layers):
        return None
    layer: Any = layers[index]
    if type(layer) is plain:
        layer.__class__ = roomy
    held, values = layer.keys, layer.values
    if type(layer) is not roomy or held is None or held.dim() != 4 or held.shape[0] != batch or held.dtype is not dtype:
        return None
    if values.shape[:3] != held.shape[:3] or values.dtype is not dtype:
        return None
    tokens = held.shape[2]
    key_room, value_room = layer._rooms
    rooms = _open(held, tokens, held, tokens + 1, key_room), _open(values, tokens, values, tokens + 1, value_room)
    layer._rooms = rooms
    return Place(rooms[0].buffer, rooms[1].buffer, tokens)


def fill(cache: Any, index: int, place: Place) -> None:
    """Count a token that was written where `place_of` said."""
    layer: Any = cache.layers[index]
    end = place.token + 1
    for room in layer._rooms:
        room.taken = end
    layer.keys, layer.values = place.keys.narrow(2, 0, end), place.values.narrow(2, 0, end)


@cache
def _roomy() -> tuple[type, type]:
    """Return transformers' layer of a growing cache, and ours."""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):  # type: ignore[misc, no-untyped-call]
        _rooms: tuple[Room | None, Room | None] = (None, None)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """As transformers' own: the keys and values of all tokens, those given here the last."""
            plain = key_states.dim() == 4 and not (torch.is_grad_enabled() and key_states.requires_grad)
            held_keys, held_values = self.keys, self.values  # None before the first
            small = held_keys is None or held_keys.nbytes + key_states.nbytes < LEAST_BYTES
            if held_keys is None or held_values is None or small or not plain or torch.compiler.is_compiling():
                both: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
                return both
            keys, values = self._rooms
            self.keys, keys = appended(held_keys, key_states, keys)
            self.values, values = appended(held_values, value_states, values)
            self._rooms = (keys, values)
            return self.keys, self.values

    RoomyLayer.__qualname__ = "RoomyLayer"
    globals()["RoomyLayer"] = RoomyLayer  # found by name when a cache is pickled
    return DynamicLayer, RoomyLayer


def give_room(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward: turn the layers of a growing cache into ours. Others (static, sliding, paged) stay."""
    held = kwargs.get("cache", kwargs.get("past_key_values"))  # its name in transformers since 5.24, and before
    if held is None or torch.compiler.is_compiling():
        return
    plain, roomy = _roomy()
    for layer in getattr(held, "layers", ()):
        if type(layer) is plain:
            layer.__class__ = roomy


def attach_cache(model: nn.Module) -> None:
    """Have every forward of a transformers model keep its keys and values in rooms; once."""
    if give_room not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(give_room, with_kwargs=True)

"""Calibration batches: what a user may give, and which of their tokens count."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zeroskip.calibrate.fp32 import to_fp32
from zeroskip.errors import ZeroskipError

__all__ = ["Batch", "read_batches"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Batch:
    """One call of the model, on the CPU until it is made.

    Attributes
    ----------
    args, kwargs
        As the user gave them.
    extra : dict
        What we add: no cache, and only one row of logits, which nobody reads.
    named : dict
        Every argument by the name that the model's forward gives it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    extra: dict[str, Any]
    named: dict[str, Any]

    def call(self, model: nn.Module) -> Any:
        """Run the model on this batch, on the device of its parameters."""
        args, kwargs = self.moved(model)
        return model(*args, **kwargs)

    def in_fp32(self) -> Batch:
        """The same batch with its floating-point numbers in fp32."""
        args, kwargs = tree_map(to_fp32, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def moved(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) of the call, on the device of the model's parameters."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return tuple(map(move, self.args)), {**{k: move(v) for k, v in self.kwargs.items()}, **self.extra}

    def visible(self, x: Tensor, arguments: Mapping[str, Any], two_towers: bool) -> Tensor | None:
        """Return which tokens of `x` are no padding: a bool mask over its leading dimensions, or None for all.

        Parameters
        ----------
        x : Tensor
            [..., in] what a site is called with; [batch, seq, in] or [batch * seq, in] can be masked.
        arguments : mapping
            The arguments of the block that runs, by name: a block that is given `encoder_hidden_states` works on the
            decoder's tokens, except where that very tensor is the input (cross attention).
        two_towers : bool
            Whether the model has an encoder and a decoder, each with a mask of its own.
        """
        encoded = arguments.get("encoder_hidden_states")
        if encoded is None:
            mask = self.named.get("attention_mask")
        elif x is encoded:
            mask = self.named.get("encoder_attention_mask")
            if mask is None and two_towers:
                mask = self.named.get("attention_mask")
        else:
            mask = self.named.get("decoder_attention_mask" if two_towers else "attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        if x.shape[:-1] == mask.shape or (x.dim() == 2 and x.shape[0] == mask.numel()):
            return mask != 0
        return None


def read_batches(model: nn.Module, given: Any, one_logit: bool = True) -> list[Batch]:
    """Turn what the user gave as `calibration` into batches.

    Parameters
    ----------
    model : nn.Module
        Its forward's parameter names are read.
    given : iterable
        Of tensors (the one positional argument), tuples or lists (positional arguments) or mappings (keyword
        arguments). Read once. A tensor or mapping alone is one batch.
    one_logit : bool
        Whether the language-model head may be asked for one row only.

    Raises
    ------
    ZeroskipError
        If there is no batch, a batch is of another type, does not fit the model's forward, or holds NaN or Inf.
    """
    forward = inspect.signature(model.forward)
    extra: dict[str, Any] = {}
    if "use_cache" in forward.parameters:
        extra["use_cache"] = False
    if one_logit and "logits_to_keep" in forward.parameters:
        extra["logits_to_keep"] = 1
    if isinstance(given, Tensor | Mapping):
        given = [given]
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ZeroskipError(f"calibration is a {type(given).__name__}: give an iterable of tensors, tuples or dicts")
    batches = [_read(index, one, forward, extra) for index, one in enumerate(given)]
    if not batches:
        raise ZeroskipError("calibration is empty: give at least one batch")
    return batches


def _read(index: int, one: Any, forward: inspect.Signature, extra: dict[str, Any]) -> Batch:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(one, Tensor):
        args = (one,)
    elif isinstance(one, Mapping):
        kwargs = dict(one)
    elif isinstance(one, tuple | list) and any(isinstance(value, Tensor) for value in one):
        args = tuple(one)
    else:
        raise ZeroskipError(f"calibration batch {index} is a {type(one).__name__}: give a tensor, a tuple or a dict")
    args = tuple(map(_to_cpu, args))
    kwargs = {str(name): _to_cpu(value) for name, value in kwargs.items()}
    try:
        bound = forward.bind_partial(*args, **kwargs)
    except TypeError as error:
        raise ZeroskipError(f"calibration batch {index} does not fit the model's forward: {error}") from None
    named = dict(bound.arguments)
    for parameter in forward.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    for name, value in named.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ZeroskipError(f"calibration batch {index}: {name} holds NaN or Inf")
        if isinstance(value, Tensor) and value.numel() == 0:
            raise ZeroskipError(f"calibration batch {index}: {name} is empty")
    return Batch(args, kwargs, {name: value for name, value in extra.items() if name not in named}, named)


def _to_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value

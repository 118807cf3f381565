"""Decoder layers of transformers whose decode step is computed by the core (decoder_stepper.py).

Nothing is known of any architecture: a layer counts if its parts have the names of decoder_parts.py and if it computes
what they say, which is found by trying. Such a module gets a class that derives from its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from zeroskip.decoder_parts import ACTIVATION, ATTENTION, PRODUCTS, parts_of
from zeroskip.decoder_step import decode
from zeroskip.decoder_stepper import STEP, Stepper, Traced
from zeroskip.derived import derive, restore
from zeroskip.nn import PackedLinear
from zeroskip.planning.folding import Done

__all__ = ["attach_layers", "detach_layers"]


def _traced(layer: Any, known: Traced, x: Any, kwargs: Mapping[str, Any]) -> Any:
    """Under torch.compile, with a static cache: the op, if the step was tried, else None. What is traced is simple."""
    cache = kwargs["cache"] if "cache" in kwargs else kwargs.get("past_key_values")
    angles, mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")
    dtype = known.dtype
    if layer.training or cache is None or angles is None or x.dim() != 3 or x.shape[1] != 1 or x.dtype != dtype:
        return None
    attention, activation = _part(layer, ATTENTION), _part(layer, ACTIVATION)
    held = cache.layers[attention.layer_idx]
    if type(held).__name__ != "StaticLayer" or not held.is_initialized or held.keys.dtype != dtype:
        return None
    if (mask is not None and mask.dtype != torch.bool) or angles[0].dtype != dtype or type(activation) is not Done:
        return None
    if attention.config._attn_implementation != "sdpa":
        return None
    products = [_part(layer, name) for name in PRODUCTS]
    norms = [None if name is None else _part(layer, name) for name in known.norm_names]
    for each, weight in zip([*products, *norms], known.weights, strict=True):
        if each is not None and each.weight is not weight:
            return None
    for each, bias in zip(products, known.biases, strict=True):
        if each.bias is not bias:
            return None
    for each in products:
        if type(each) is not PackedLinear or each.kernel is not None:
            return None
    for each in [*products, *norms, activation, attention]:
        if each is not None and (len(each._forward_hooks) or len(each._forward_pre_hooks)):
            return None
    y = decode(x, angles[0], angles[1], held.keys, held.values, held.cumulative_length, mask, known.number)
    held.cumulative_length.add_(1)
    return y


def _watched() -> bool:
    return torch.is_grad_enabled() or torch.compiler.is_exporting()


def _part(layer: Any, name: str) -> Any:
    for each in name.split("."):
        layer = getattr(layer, each)
    return layer


class OneStep(nn.Module):
    """Before the class of a decoder layer: its step where that may be."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = None
        if not torch.compiler.is_compiling():
            y = self.__dict__[STEP](self, super().forward, args, kwargs)
        elif len(args) == 1 and not _watched():
            known = self.__dict__[STEP].traced
            y = None if known is None else _traced(self, known, args[0], kwargs)
        return super().forward(*args, **kwargs) if y is None else y


def attach_layers(model: nn.Module) -> None:
    """Let the decoder layers of a model whose parts are known compute their steps in a row of calls; once."""
    for module in model.modules():
        if STEP not in module.__dict__ and parts_of(module) is not None:
            module.__dict__[STEP] = Stepper()
            derive(module, OneStep)


def detach_layers(model: nn.Module) -> None:
    """Give them their own classes back."""
    for module in model.modules():
        if module.__dict__.pop(STEP, None) is not None:
            restore(module)

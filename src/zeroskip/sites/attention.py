"""nn.MultiheadAttention: three projections in one weight, and one that is never called as a module."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from zeroskip.sites.base import Adapter, Call, Inputs

__all__ = ["AttentionAdapter"]

APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class AttentionAdapter(Adapter):
    """in_proj_weight [3 x embed, embed] as three groups: query, key, value; or three weights; and out_proj.weight."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        if not isinstance(module, nn.MultiheadAttention):
            return False
        own = type(module).forward is nn.MultiheadAttention.forward and "weight" in module.out_proj._parameters
        return own and all(module._parameters.get(name) is not None for name in _projections(module))

    @staticmethod
    def parameters(module: nn.Module) -> tuple[str, ...]:
        return (*_projections(cast(nn.MultiheadAttention, module)), "out_proj.weight")

    @staticmethod
    def view(module: nn.Module, parameter: str, value: Tensor) -> Tensor:
        return value.view(3, -1, value.shape[-1]) if parameter == "in_proj_weight" else value.unsqueeze(0)

    @staticmethod
    def back(module: nn.Module, parameter: str, matrices: Tensor) -> Tensor:
        return matrices.flatten(0, 1)

    @staticmethod
    def bias(module: nn.Module, parameter: str) -> Tensor | None:
        attention = cast(nn.MultiheadAttention, module)
        if parameter == "out_proj.weight":
            return attention.out_proj.bias
        bias = attention.in_proj_bias
        return bias if bias is None or parameter == "in_proj_weight" else bias.chunk(3)[APART.index(parameter)]

    @staticmethod
    def inputs(module: nn.Module, call: Call, wanted: Sequence[str]) -> Iterator[tuple[str, Inputs]]:
        attention = cast(nn.MultiheadAttention, module)
        named = call.named(nn.MultiheadAttention.forward)
        given: list[Tensor] = [named[name] for name in ("query", "key", "value")]
        if "in_proj_weight" in wanted:
            same = given[0] is given[1] and given[1] is given[2]
            each = [call.tokens(x) for x in given[: 1 if same else 3]]
            yield "in_proj_weight", each[0].unsqueeze(0) if same else each
        for name, x in zip(APART, given, strict=True):
            if name in wanted:
                yield name, call.tokens(x).unsqueeze(0)
        if "out_proj.weight" in wanted:
            yield "out_proj.weight", call.tokens(_heads(attention, call)).unsqueeze(0)


def _projections(attention: nn.MultiheadAttention) -> tuple[str, ...]:
    return ("in_proj_weight",) if attention._qkv_same_embed_dim else APART


def _heads(attention: nn.MultiheadAttention, call: Call) -> Tensor:
    """Return what the output projection is given, shaped like the module's output: the module with I in its place."""
    twin: Any = copy.copy(attention)
    eye = nn.Linear(attention.embed_dim, attention.embed_dim, device="meta")
    weight = attention.out_proj.weight
    eye.weight = nn.Parameter(torch.eye(len(weight), dtype=weight.dtype, device=weight.device), requires_grad=False)
    eye.bias = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=False)
    twin.__dict__["_modules"] = {**attention._modules, "out_proj": eye}
    with torch.no_grad():
        output: Tensor = nn.MultiheadAttention.forward(twin, *call.args, **call.kwargs)[0]
    return output

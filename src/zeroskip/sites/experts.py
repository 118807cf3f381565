"""Stacked experts: one parameter [experts, out, in] (or [experts, in, out]) of which each token meets a few slices.

How an expert computes is its own affair: to see the inputs, the module is run as it is, and every matrix product whose
right-hand side lies in the parameter tells what its slice was multiplied with.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zeroskip.sites.base import Adapter, Call, Inputs, is_weight

__all__ = ["ExpertsAdapter", "transposed"]

aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}


class ExpertsAdapter(Adapter):
    """The experts of transformers' mixtures: `num_experts`, and parameters of three dimensions, the first of that size.

    Inputs are those that the router sends to each expert; padding is left out.
    """

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return isinstance(getattr(module, "num_experts", None), int) and bool(ExpertsAdapter.parameters(module))

    @staticmethod
    def parameters(module: nn.Module) -> tuple[str, ...]:
        count = module.num_experts
        own = module._parameters.items()
        return tuple(name for name, p in own if p is not None and is_weight(module, name, 3) and p.shape[0] == count)

    @staticmethod
    def view(module: nn.Module, parameter: str, value: Tensor) -> Tensor:
        return value.transpose(1, 2) if transposed(module) else value

    @staticmethod
    def back(module: nn.Module, parameter: str, matrices: Tensor) -> Tensor:
        return matrices.transpose(1, 2) if transposed(module) else matrices

    @staticmethod
    def bias(module: nn.Module, parameter: str) -> Tensor | None:
        bias = getattr(module, f"{parameter}_bias", None)
        return bias if isinstance(bias, Tensor) else None

    @staticmethod
    def inputs(module: nn.Module, call: Call, wanted: Sequence[str]) -> Iterator[tuple[str, Inputs]]:
        with torch.no_grad(), _Watch({name: module.get_parameter(name).detach() for name in wanted}) as watch:
            # Beneath any decorator that would take the experts through one fused call.
            inspect.unwrap(type(module).forward)(module, *_without_padding(module, call), **call.kwargs)
        for name, seen in watch.seen.items():
            if any(seen):
                stacked = module.get_parameter(name)
                width = ExpertsAdapter.view(module, name, stacked).shape[-1]
                yield name, [torch.cat(each) if each else stacked.new_zeros(0, width).detach() for each in seen]


def transposed(module: nn.Module) -> bool:
    """Whether the stack is [experts, in, out]: transformers says so, or else the first one's sizes do."""
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    first = module.get_parameter(ExpertsAdapter.parameters(module)[0])
    hidden = getattr(module, "hidden_size", getattr(module, "hidden_dim", None))
    return first.shape[1] == hidden != first.shape[2]


def _without_padding(module: nn.Module, call: Call) -> tuple[Any, ...]:
    """The positional arguments, cut to the tokens that count where they are [tokens, ...]."""
    x, count = call.x, cast(int, module.num_experts)
    if not call.args or x.dim() != 2:
        return call.args
    keep = call.visible(x)
    if keep is None and len(x) % count == 0:  # every token once for each expert
        keep = call.visible(x.view(count, -1, x.shape[1])[0])
        keep = None if keep is None else keep.reshape(-1).repeat(count)
    if keep is None:
        return call.args
    keep = keep.reshape(-1).to(x.device)

    def cut(value: Any) -> Any:
        return value[keep] if isinstance(value, Tensor) and value.dim() and len(value) == len(keep) else value

    return tuple(map(cut, call.args))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every matrix product; of those with a slice of a stack, keeps the left-hand side."""

    def __init__(self, stacks: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stacks = stacks
        self.seen: dict[str, list[list[Tensor]]] = {name: [[] for _ in stack] for name, stack in stacks.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            left, right = args[PRODUCTS[func] :][:2]
            for name, stack in self.stacks.items():
                apart = right.data_ptr() - stack.data_ptr()
                if 0 <= apart < stack.nbytes:
                    self._note(name, apart // (stack.stride(0) * stack.element_size()), left)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, first: int, left: Tensor) -> None:
        if left.dim() == 2:
            self.seen[name][first].append(left.detach().clone())
            return
        for expert, x in enumerate(left, start=first):  # all at once: who is not sent to an expert is a row of zeros
            self.seen[name][expert].append(x[x.any(1)])

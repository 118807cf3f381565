"""Modules that work in fp32 for a while, whatever their numbers are stored in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

__all__ = ["Wide", "in_fp32", "in_fp32_by_parts", "to_fp32"]

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def in_fp32(module: nn.Module) -> Iterator[None]:
    """Hold the module's numbers in fp32, then put them back into their own types."""
    held = [*module.parameters(), *module.buffers()]
    types = [tensor.dtype for tensor in held]
    wanted = [tensor.requires_grad for tensor in held]
    try:
        for tensor in held:
            tensor.requires_grad_(False)
            tensor.data = to_fp32(tensor.data)
        yield
    finally:
        for tensor, dtype, grad in zip(held, types, wanted, strict=True):
            tensor.grad = None
            tensor.data = tensor.data.to(dtype)
            tensor.requires_grad_(grad)


@contextmanager
def in_fp32_by_parts(model: nn.Module) -> Iterator[None]:
    """Let a model compute in fp32 with the half-precision numbers of one part at a time, so that mapped ones stay.

    A part is an item of a list of modules with all that is in it, for some use numbers of modules that they never call;
    or a module outside of them. What comes out is what `model.float()` gives, unless a part reads another one's type.
    """
    held: list[list[tuple[Tensor, Tensor]]] = []

    def shown(tensors: list[Tensor]) -> tuple[Any, Any]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            held.append([(each, each.data) for each in tensors if each.dtype in HALF])
            for each, data in held[-1]:
                each.data = data.float()
            return tree_map(to_fp32, (args, kwargs)) if held[-1] else None

        def after(module: nn.Module, *_: Any) -> None:
            for each, data in held.pop():
                each.data = data

        return before, after

    hooks: list[Any] = []
    try:
        for part, tensors in _parts(model):
            before, after = shown(tensors)
            hooks.append(part.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(part.register_forward_hook(after, always_call=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _parts(model: nn.Module) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside:
            continue
        if isinstance(module, nn.ModuleList):
            for item in module:
                inside.update(item.modules())
                yield item, [*item.parameters(), *item.buffers()]
        else:
            own = [*module._parameters.values(), *module._buffers.values()]
            yield module, [each for each in own if each is not None]


class Wide:
    """Modules that show their half-precision numbers in fp32 while they run, on the CPU, where half ones are slow.

    The stored numbers are not touched: mapped from a file, they stay mapped. Nothing may write to a module meanwhile.

    Parameters
    ----------
    on : bool
        False for models that only run in the type they are stored in.
    """

    def __init__(self, on: bool = True) -> None:
        self.on = on
        self.held: dict[nn.Module, torch.dtype] = {}

    @contextmanager
    def hold(self, module: nn.Module) -> Iterator[None]:
        """Keep a module in fp32 for several calls."""
        numbers = [*module.parameters(), *module.buffers()] if self.on and module not in self.held else []
        half = [each for each in numbers if each.dtype in HALF and each.is_cpu]
        stored = [each.data for each in half]
        try:
            for each in half:
                each.data = each.data.float()
                self.held[module] = stored[0].dtype
            yield
        finally:
            for each, data in zip(half, stored, strict=True):
                each.data = data
                self.held.pop(module, None)

    def call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module's forward; what it returns is rounded to the type that its first half-precision number has."""
        with self.hold(module):
            stored = self.held.get(module)
            if stored is None:
                return forward(*args, **kwargs)
            args, kwargs = tree_map(to_fp32, (args, kwargs))
            return tree_map(lambda leaf: _rounded(leaf, stored), forward(*args, **kwargs))


def to_fp32(leaf: Any) -> Any:
    """Return a floating-point tensor in fp32, anything else as it is."""
    return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _rounded(leaf: Any, to: torch.dtype) -> Any:
    return leaf.to(to) if isinstance(leaf, Tensor) and leaf.dtype == torch.float32 else leaf

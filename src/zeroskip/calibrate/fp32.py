"""A module that works in fp32 for a while, whatever its numbers are stored in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["in_fp32", "to_fp32"]


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


def to_fp32(leaf: Any) -> Any:
    """Return a floating-point tensor in fp32, anything else as it is."""
    return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

"""What each op of ours needs: dtype codes, the number of threads, memory for outputs, a place in torch's registry."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.dlpack import from_dlpack

from zeroskip import _core
from zeroskip.errors import ZeroskipError

__all__ = ["TYPES", "aligned", "fp32_bias", "is_plain", "output", "register", "threads", "type_of"]

TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_LARGE = 32 << 20  # bytes: malloc maps such a block anew for every call, csrc/pool.h keeps it
_forked = False
_library = torch.library.Library("zeroskip", "DEF")  # type: ignore[no-untyped-call]


def _after_fork() -> None:
    global _forked
    _forked = True  # a parallel region hangs in a forked child: its pool of threads was not copied


os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """Return how many threads a kernel may use: torch's number, one in a forked child."""
    return 1 if _forked else torch.get_num_threads()


def is_plain(x: Tensor) -> bool:
    """Return whether nothing but the kernel has to see a call: no tracing, no dispatch mode, no gradient.

    Then the dispatcher, which costs more than the checks of a call and its output together, may be left out.
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._get_tracing_state()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not (x.requires_grad and torch.is_grad_enabled())
        and not x.is_neg()
        and forward_ad._current_level < 0
    )


def type_of(x: Tensor) -> int:
    """Return the code of x's dtype; one that no kernel takes raises ZeroskipError."""
    kind = TYPES.get(x.dtype)
    if kind is None:
        raise ZeroskipError(f"x is {x.dtype}: packed weights take float32, bfloat16 or float16 activations")
    return kind


def output(x: Tensor, shape: Sequence[int], kind: int) -> Tensor:
    """Return an unset tensor for the result of a kernel, in x's dtype, of code `kind`."""
    if math.prod(shape) * x.element_size() < _LARGE:
        return x.new_empty(shape)
    return from_dlpack(_core.output(list(shape), kind))


def aligned(blob: Tensor) -> Tensor:
    """Return the blob, or a copy where it lies or begins at odd places."""
    return blob.clone() if blob.data_ptr() % 64 or not blob.is_contiguous() else blob


def fp32_bias(bias: Tensor, m: int) -> Tensor:
    """Return a bias [m] as kernels read it; another shape raises ZeroskipError."""
    if bias.shape != (m,):
        raise ZeroskipError(f"bias has shape {list(bias.shape)}, expected [{m}]")
    return bias if bias.dtype is torch.float32 and bias.is_contiguous() else bias.to(torch.float32).contiguous()


def register(schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Any:
    """Define an op for CPU tensors and return what calls it; finding its overload anew would cost half a microsecond.

    Going back through an eager call for a gradient raises; torch alone would only warn, and leave the gradient out, as
    it does under torch.compile and torch.func.

    Parameters
    ----------
    schema : str
        As torch writes it: ``"name(Tensor x, ...) -> Tensor"``.
    run, fake : callable
        What computes the result, and what tells its shape and dtype while torch traces.
    """
    name = schema.partition("(")[0]
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, run, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"zeroskip::{name}", fake, lib=_library)
    op, apply = getattr(torch.ops.zeroskip, name).default, cast(Any, _NoGradient).apply

    def call(*args: Any) -> Any:
        return apply(run, *args) if _wants_gradient(args) else op(*args)

    return call


def _wants_gradient(args: Sequence[Any]) -> bool:
    """Return whether autograd records a call of an op that is otherwise plain."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return any(isinstance(each, Tensor) and each.requires_grad for each in args) and is_plain(args[0].detach())


class _NoGradient(torch.autograd.Function):
    """Computes, and raises on the way back."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *args: Any) -> Tensor:
        return run(*args)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise ZeroskipError(
            "a packed layer has no gradient: train the model before it is compiled, or freeze what comes before the "
            "layer (requires_grad_(False)), or call it under torch.no_grad()"
        )

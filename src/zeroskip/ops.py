"""The one route from a tensor to a kernel, eager and compiled alike: `torch.ops.zeroskip.linear`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from zeroskip import _core
from zeroskip.errors import ZeroskipError, expect, suggest
from zeroskip.formats.base import Packed

__all__ = [
    "ACTIVATIONS",
    "activation_code",
    "call",
    "call_by",
    "call_many",
    "call_one",
    "call_plain",
    "convolve",
    "is_plain",
    "kernels",
    "linear",
    "run",
    "tune",
]

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "relu2")
_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_LARGE = 32 << 20  # bytes: malloc maps such a block anew for every call, csrc/pool.h keeps it
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True  # a parallel region hangs in a forked child: its pool of threads was not copied


os.register_at_fork(after_in_child=_after_fork)


def activation_code(activation: str | None) -> int:
    """The code of an activation's name (None is ``"none"``); an unknown one raises ZeroskipError."""
    name = activation or "none"
    if name not in ACTIVATIONS:
        raise ZeroskipError(f"unknown activation {name!r}{suggest(name, ACTIVATIONS)}")
    return ACTIVATIONS.index(name)


def _output(x: Tensor, shape: Sequence[int], kind: int) -> Tensor:
    """Return an unset tensor for the result of a kernel, in x's dtype, of code `kind`."""
    if math.prod(shape) * x.element_size() < _LARGE:
        return x.new_empty(shape)
    return from_dlpack(_core.output(list(shape), kind))


def call_plain(x: Tensor, blob: Tensor, bias: Tensor | None, m: int, act: int, kernel: str | None = None) -> Tensor:
    """Do what the ops do, without the dispatcher: only where `is_plain`."""
    kind = _TYPES.get(x.dtype)
    if kind is None:
        raise ZeroskipError(f"x is {x.dtype}: packed weights take float32, bfloat16 or float16 activations")
    shape = x.shape
    if not shape or blob.dtype is not torch.int8:
        raise ZeroskipError(f"expected x [..., k] and an int8 blob, got x {list(shape)} and {blob.dtype}")
    k = shape[-1]
    # Asking is cheaper than converting what needs none: each torch call here costs every packed site a microsecond.
    if not x.is_contiguous():
        x = x.contiguous()
    address = 0
    if bias is not None:
        bias = _plain_bias(bias, m)
        address = bias.data_ptr()
    at = blob.data_ptr()
    if at % 64 or not blob.is_contiguous():
        blob = blob.clone()
        at = blob.data_ptr()
    y = _output(x, (*shape[:-1], m), kind)
    try:
        _core.linear(
            x.data_ptr(), kind, x.numel() // k if k else 0, k, at, blob.numel(), address, act,
            y.data_ptr(), m, 1 if _forked else torch.get_num_threads(), kernel,
        )  # fmt: skip
    except ValueError as error:
        raise ZeroskipError(str(error)) from None
    return y


def _plain_bias(bias: Tensor, m: int) -> Tensor:
    if bias.shape != (m,):
        raise ZeroskipError(f"bias has shape {list(bias.shape)}, expected [{m}]")
    return bias if bias.dtype is torch.float32 and bias.is_contiguous() else bias.to(torch.float32).contiguous()


def _extents(geometry: Sequence[int], space: Sequence[int]) -> list[int]:
    """The output's extents; `geometry` has kernel, stride, dilation and padding (on both sides), an axis each."""
    n = len(space)
    sizes, strides, dilations, around = (geometry[i * n : (i + 1) * n] for i in range(4))
    each = zip(space, sizes, strides, dilations, around, strict=True)
    return [
        (extent + 2 * pad - dilation * (size - 1) - 1) // stride + 1 for extent, size, stride, dilation, pad in each
    ]


def _convolve(
    x: Tensor, blob: Tensor, bias: Tensor | None, m: int, geometry: Sequence[int], kernel: str | None = None
) -> Tensor:
    kind, axes = _TYPES.get(x.dtype), x.dim() - 2
    if kind is None:
        raise ZeroskipError(f"x is {x.dtype}: packed weights take float32, bfloat16 or float16 activations")
    if axes not in (1, 2, 3) or len(geometry) != 4 * axes or blob.dtype is not torch.int8:
        raise ZeroskipError(f"expected x [batch, *space, channels] and an int8 blob, got {list(x.shape)}, {blob.dtype}")
    batch, *space, channels = x.shape
    out = _extents(geometry, space)
    if min(out) < 1:
        raise ZeroskipError(f"x is {list(x.shape)}: too small for a kernel of {list(geometry[:axes])}")
    bias = None if bias is None else _plain_bias(bias, m)
    x = x.contiguous()
    if blob.data_ptr() % 64 or not blob.is_contiguous():
        blob = blob.clone()
    y = _output(x, (batch, *out, m), kind)
    one, none = [1] * (3 - axes), [0] * (3 - axes)
    kernels_, strides, dilations, before = (list(geometry[i * axes : (i + 1) * axes]) for i in range(4))
    sizes = [
        batch,
        channels,
        *one,
        *space,
        *one,
        *kernels_,
        *one,
        *strides,
        *one,
        *dilations,
        *none,
        *before,
        *one,
        *out,
    ]
    try:
        _core.convolve(
            x.data_ptr(), kind, x.numel(), sizes, blob.data_ptr(), blob.numel(), 0 if bias is None else bias.data_ptr(),
            0, y.data_ptr(), m, 1 if _forked else torch.get_num_threads(), kernel,
        )  # fmt: skip
    except ValueError as error:
        raise ZeroskipError(str(error)) from None
    return y


def _convolve_fake(
    x: Tensor, blob: Tensor, bias: Tensor | None, m: int, geometry: Sequence[int], kernel: str | None = None
) -> Tensor:
    return x.new_empty((x.shape[0], *_extents(geometry, x.shape[1:-1]), m))


Part = tuple[Tensor, Tensor | None, int, int, str | None]  # blob, bias, m, act, kernel (None: the one chosen)


def call_one(x: Tensor, part: Part) -> Tensor:
    """Call the op: with the kernel chosen for this many tokens, or with the one that the part names."""
    blob, bias, m, act, kernel = part
    y: Tensor = call(x, blob, bias, m, act) if kernel is None else call_by(x, blob, bias, m, act, kernel)
    return y


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
    )


def call_many(x: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Return what `call_one` returns for each part, with what concerns `x` done once and no dispatcher between.

    What is out of the ordinary takes the ordinary way.
    """
    kind, shape = _TYPES.get(x.dtype), x.shape
    if kind is None or not is_plain(x) or not x.is_contiguous() or not x.numel():
        return [call_one(x, part) for part in parts]
    k = shape[-1]
    at, tokens, threads = x.data_ptr(), x.numel() // k, 1 if _forked else torch.get_num_threads()
    out: list[Tensor] = []
    for part in parts:
        blob, bias, m, act, kernel = part
        address, where = 0, blob.data_ptr()
        if bias is not None:
            plain = bias.dtype is torch.float32 and bias.is_contiguous() and bias.shape == (m,)
            address = bias.data_ptr() if plain else -1
        if address < 0 or where % 64 or blob.dtype is not torch.int8 or not blob.is_contiguous():
            out.append(call_one(x, part))
            continue
        y = _output(x, (*shape[:-1], m), kind)
        try:
            _core.linear(
                at, kind, tokens, k, where, blob.numel(), address, act, y.data_ptr(), m, threads, kernel
            )  # fmt: skip
        except ValueError as error:
            raise ZeroskipError(str(error)) from None
        out.append(y)
    return out


def _linear_fake(x: Tensor, blob: Tensor, bias: Tensor | None, m: int, act: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], m))


def _linear_by_fake(x: Tensor, blob: Tensor, bias: Tensor | None, m: int, act: int, kernel: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], m))


_library = torch.library.Library("zeroskip", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "linear(Tensor x, Tensor blob, Tensor? bias, int m, int act) -> Tensor"
)
_library.impl("linear", call_plain, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("zeroskip::linear", _linear_fake, lib=_library)
_library.define(  # type: ignore[no-untyped-call]
    "linear_by(Tensor x, Tensor blob, Tensor? bias, int m, int act, str kernel) -> Tensor"
)
_library.impl("linear_by", call_plain, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("zeroskip::linear_by", _linear_by_fake, lib=_library)
_library.define(  # type: ignore[no-untyped-call]
    "convolve(Tensor x, Tensor blob, Tensor? bias, int m, int[] geometry, str? kernel=None) -> Tensor"
)
_library.impl("convolve", _convolve, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("zeroskip::convolve", _convolve_fake, lib=_library)
convolve = torch.ops.zeroskip.convolve.default  # x [batch, *space, channels] -> y [batch, *out, m]
call_by = torch.ops.zeroskip.linear_by.default  # with one kernel for every number of tokens
call = torch.ops.zeroskip.linear.default  # the overload itself: finding it anew costs each call half a microsecond


def linear(packed: Packed, x: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """y = activation(x Wᵀ + bias) for a packed W [m, k].

    Parameters
    ----------
    x
        [..., k], float32, bfloat16 or float16, any strides; not modified.
    bias
        [m], floating point, or None.
    activation
        None or a name of `ACTIVATIONS`, applied to the fp32 sum.

    Returns
    -------
    Tensor
        [..., m] in x's dtype. Sums are fp32; a skipped weight contributes 0, also where x is Inf or NaN.

    Raises
    ------
    ZeroskipError
        A dtype, shape or name that does not fit; the line states it.
    """
    expect("packed", packed, Packed, "what pack() returns")
    expect("x", x, Tensor, "a tensor")
    expect("bias", bias, Tensor | None, "a tensor or None")
    for name, given in (("x", x), ("bias", bias)):
        if given is not None and (given.layout is not torch.strided or given.is_quantized or given.is_nested):
            raise ZeroskipError(f"{name} is no plain dense tensor ({given.layout}): convert it first")
    if bias is not None and (bias.device != x.device or not bias.is_floating_point()):
        raise ZeroskipError(f"bias is {bias.dtype} on {bias.device}: give floating-point numbers on {x.device}")
    result: Tensor = call(x, packed.blob, bias, packed.shape[0], activation_code(activation))
    return result


def run(
    packed: Packed, x: Tensor, bias: Tensor | None = None, activation: str | None = None, kernel: str | None = None
) -> Tensor:
    """Like `linear`, with one kernel forced (None: the one chosen for this many tokens)."""
    return call_plain(x, packed.blob, bias, packed.shape[0], activation_code(activation), kernel)


def kernels(packed: Packed) -> tuple[str, ...]:
    """The kernels that can serve this blob on this CPU, highest ISA row first."""
    return tuple(_core.kernels(packed.blob.data_ptr(), packed.blob.numel()))


def tune(packed: Packed, buckets: Sequence[tuple[int | None, str]]) -> None:
    """Set which kernel serves which token counts, for every blob of this key in the process.

    The key is format, value type, shape, pattern, and nnz within 2 %.

    Parameters
    ----------
    buckets
        (max_tokens, kernel) in ascending order; the last max_tokens is None (open).
    """
    try:
        _core.tune(packed.blob.data_ptr(), packed.blob.numel(), list(buckets))
    except ValueError as error:
        raise ZeroskipError(str(error)) from None

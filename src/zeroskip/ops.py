"""The one route from a tensor to a kernel, eager and compiled alike: `torch.ops.zeroskip.linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zeroskip import _core
from zeroskip.errors import ZeroskipError, expect, suggest
from zeroskip.formats.base import Packed
from zeroskip.native import TYPES, aligned, fp32_bias, is_plain, output, register, threads, type_of

__all__ = [
    "ACTIVATIONS",
    "activation_code",
    "call",
    "call_by",
    "call_many",
    "call_one",
    "call_plain",
    "kernels",
    "linear",
    "run",
    "tune",
]

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "relu2")


def activation_code(activation: str | None) -> int:
    """The code of an activation's name (None is ``"none"``); an unknown one raises ZeroskipError."""
    name = activation or "none"
    if name not in ACTIVATIONS:
        raise ZeroskipError(f"unknown activation {name!r}{suggest(name, ACTIVATIONS)}")
    return ACTIVATIONS.index(name)


def call_plain(x: Tensor, blob: Tensor, bias: Tensor | None, m: int, act: int, kernel: str | None = None) -> Tensor:
    """Do what the ops do, without the dispatcher: only where `is_plain`."""
    kind, shape = type_of(x), x.shape
    if not shape or blob.dtype is not torch.int8:
        raise ZeroskipError(f"expected x [..., k] and an int8 blob, got x {list(shape)} and {blob.dtype}")
    k = shape[-1]
    # Asking is cheaper than converting what needs none: each torch call here costs every packed site a microsecond.
    if not x.is_contiguous():
        x = x.contiguous()
    address = 0
    if bias is not None:
        bias = fp32_bias(bias, m)
        address = bias.data_ptr()
    blob = aligned(blob)
    y = output(x, (*shape[:-1], m), kind)
    try:
        _core.linear(
            x.data_ptr(), kind, x.numel() // k if k else 0, k, blob.data_ptr(), blob.numel(), address, act,
            y.data_ptr(), m, threads(), kernel,
        )  # fmt: skip
    except ValueError as error:
        raise ZeroskipError(str(error)) from None
    return y


Part = tuple[Tensor, Tensor | None, int, int, str | None]  # blob, bias, m, act, kernel (None: the one chosen)


def call_one(x: Tensor, part: Part) -> Tensor:
    """Call the op: with the kernel chosen for this many tokens, or with the one that the part names."""
    blob, bias, m, act, kernel = part
    y: Tensor = call(x, blob, bias, m, act) if kernel is None else call_by(x, blob, bias, m, act, kernel)
    return y


def call_many(x: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Return what `call_one` returns for each part, with what concerns `x` done once and no dispatcher between.

    What is out of the ordinary takes the ordinary way.
    """
    kind, shape = TYPES.get(x.dtype), x.shape
    if kind is None or not is_plain(x) or not x.is_contiguous() or not x.numel():
        return [call_one(x, part) for part in parts]
    k = shape[-1]
    at, tokens, count = x.data_ptr(), x.numel() // k, threads()
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
        y = output(x, (*shape[:-1], m), kind)
        try:
            _core.linear(
                at, kind, tokens, k, where, blob.numel(), address, act, y.data_ptr(), m, count, kernel
            )  # fmt: skip
        except ValueError as error:
            raise ZeroskipError(str(error)) from None
        out.append(y)
    return out


def _linear_fake(x: Tensor, blob: Tensor, bias: Tensor | None, m: int, act: int, kernel: str = "") -> Tensor:
    return x.new_empty((*x.shape[:-1], m))


call = register("linear(Tensor x, Tensor blob, Tensor? bias, int m, int act) -> Tensor", call_plain, _linear_fake)
# With one kernel for every number of tokens.
call_by = register(
    "linear_by(Tensor x, Tensor blob, Tensor? bias, int m, int act, str kernel) -> Tensor", call_plain, _linear_fake
)


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
        A dtype, shape or name that does not fit; the line states it. On the way back, if a gradient is asked for.
    """
    expect("packed", packed, Packed, "what pack() returns")
    expect("x", x, Tensor, "a tensor")
    expect("bias", bias, Tensor | None, "a tensor or None")
    for name, given in (("x", x), ("bias", bias)):
        if given is not None and (given.layout is not torch.strided or given.is_quantized or given.is_nested):
            raise ZeroskipError(f"{name} is no plain dense tensor ({given.layout}): convert it first")
    if bias is not None and (bias.device != x.device or not bias.is_floating_point()):
        raise ZeroskipError(f"bias is {bias.dtype} on {bias.device}: give floating-point numbers on {x.device}")
    rest = packed.blob, bias, packed.shape[0], activation_code(activation)
    if is_plain(x) and (bias is None or is_plain(bias)):
        return call_plain(x, *rest)
    result: Tensor = call(x, *rest)
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

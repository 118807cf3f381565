"""The op of a convolution: its patches, cut as the kernel packs its input (csrc/patches.cpp), times a packed weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zeroskip import _core
from zeroskip.errors import ZeroskipError
from zeroskip.native import aligned, fp32_bias, output, register, threads, type_of

__all__ = ["convolve"]


def _extents(geometry: Sequence[int], space: Sequence[int]) -> list[int]:
    """The output's extents; `geometry` has kernel, stride, dilation and padding (on both sides), an axis each."""
    n = len(space)
    sizes, strides, dilations, around = (geometry[i * n : (i + 1) * n] for i in range(4))
    each = zip(space, sizes, strides, dilations, around, strict=True)
    return [
        (extent + 2 * pad - dilation * (size - 1) - 1) // stride + 1 for extent, size, stride, dilation, pad in each
    ]


def convolve_plain(
    x: Tensor, blob: Tensor, bias: Tensor | None, m: int, geometry: Sequence[int], kernel: str | None = None
) -> Tensor:
    kind, axes = type_of(x), x.dim() - 2
    if axes not in (1, 2, 3) or len(geometry) != 4 * axes or blob.dtype is not torch.int8:
        raise ZeroskipError(f"expected x [batch, *space, channels] and an int8 blob, got {list(x.shape)}, {blob.dtype}")
    batch, *space, channels = x.shape
    out = _extents(geometry, space)
    if min(out) < 1:
        raise ZeroskipError(f"x is {list(x.shape)}: too small for a kernel of {list(geometry[:axes])}")
    bias = None if bias is None else fp32_bias(bias, m)
    x = x.contiguous()
    blob = aligned(blob)
    y = output(x, (batch, *out, m), kind)
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
            0, y.data_ptr(), m, threads(), kernel,
        )  # fmt: skip
    except ValueError as error:
        raise ZeroskipError(str(error)) from None
    return y


def _convolve_fake(
    x: Tensor, blob: Tensor, bias: Tensor | None, m: int, geometry: Sequence[int], kernel: str | None = None
) -> Tensor:
    return x.new_empty((x.shape[0], *_extents(geometry, x.shape[1:-1]), m))


convolve = register(
    "convolve(Tensor x, Tensor blob, Tensor? bias, int m, int[] geometry, str? kernel=None) -> Tensor",
    convolve_plain,
    _convolve_fake,
)

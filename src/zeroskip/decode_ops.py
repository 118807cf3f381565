"""Two ops that a decode step runs between its products: attention of one query a head, and the root-mean-square norm.

What torch does for one token in six calls and more is one here. The kernels are csrc/attention and csrc/norm; a result
depends neither on the number of threads nor on what else is in the batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zeroskip import _core
from zeroskip.errors import ZeroskipError
from zeroskip.native import TYPES, is_plain, register, threads

__all__ = ["attend", "attend_plain", "can_attend", "can_normalise", "normalise", "normalise_plain"]


def can_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Return whether `attend` takes these: one query a head, one dtype, at most a boolean mask that all heads share."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or q.dtype not in TYPES or q.device.type != "cpu":
        return False
    batch, heads, queries, depth = q.shape
    groups, tokens = k.shape[1], k.shape[2]
    if queries != 1 or k.shape[0] != batch or v.shape[0] != batch or k.shape[3] != depth or v.shape[1] != groups:
        return False
    if tokens < 1 or v.shape[2] != tokens or depth < 1 or v.shape[3] < 1 or groups < 1 or heads % groups:
        return False
    if k.dtype is not q.dtype or v.dtype is not q.dtype or k.device != q.device or v.device != q.device:
        return False
    return mask is None or (
        mask.dtype is torch.bool
        and mask.dim() == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1:] == (1, 1, tokens)
    )


def attend_plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Do what the op does, without the dispatcher.

    Parameters
    ----------
    q : Tensor
        [batch, heads, 1, depth], fp32, bf16 or fp16.
    k, v : Tensor
        [batch, groups, tokens, depth] and [batch, groups, tokens, width] of q's dtype, any strides: keys and values are
        read where they lie as long as the elements of a row are neighbours. `heads` is a multiple of `groups`.
    mask : Tensor or None
        bool [batch or 1, 1, 1, tokens], false where a token is not looked at.
    scale : float
        Of the products of queries and keys.

    Returns
    -------
    Tensor
        [batch, 1, heads, width], contiguous; sums are fp32. Zeros where a mask leaves no token.

    Raises
    ------
    ZeroskipError
        For shapes, dtypes or devices that do not fit.
    """
    if not can_attend(q, k, v, mask):
        shapes = ", ".join(f"{list(x.shape)} {x.dtype}" for x in (q, k, v, mask) if x is not None)
        raise ZeroskipError(f"attend takes one query a head [batch, heads, 1, depth], keys and values; got {shapes}")
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, _, depth = q.shape
    _, groups, tokens, width = v.shape
    address = stride = 0
    if mask is not None:
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        address, stride = mask.data_ptr(), mask.stride(0) if mask.shape[0] > 1 else 0
    y = q.new_empty((batch, 1, heads, width))
    at, by, of = q.stride(), k.stride(), v.stride()
    sizes = [batch, heads, groups, tokens, depth, width, at[0], at[1], *by[:3], *of[:3], stride]
    _core.attend(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), address, y.data_ptr(), TYPES[q.dtype], scale, sizes, threads()
    )  # fmt: skip
    return y


def can_normalise(x: Tensor, weight: Tensor) -> bool:
    """Return whether `normalise` takes these."""
    known = x.dtype in TYPES and (weight.dtype is x.dtype or weight.dtype is torch.float32)
    return known and x.dim() > 0 and x.shape[-1:] == weight.shape and weight.numel() > 0 and x.device.type == "cpu"


def normalise_plain(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Do what the op does, without the dispatcher: x / sqrt(mean(x^2) + eps) (weight + offset).

    Parameters
    ----------
    x : Tensor
        [..., width], fp32, bf16 or fp16.
    weight : Tensor
        [width], of x's dtype or fp32.
    eps, offset : float

    Returns
    -------
    Tensor
        As x, contiguous; computed in fp32 and rounded once.

    Raises
    ------
    ZeroskipError
        For shapes or dtypes that do not fit.
    """
    if not can_normalise(x, weight):
        given = f"x {list(x.shape)} {x.dtype} and a weight {list(weight.shape)} {weight.dtype}"
        raise ZeroskipError(f"normalise takes x [..., width] and a weight [width] of its dtype or fp32; got {given}")
    x, weight = x.contiguous(), weight.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    _core.normalise(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), TYPES[x.dtype], TYPES[weight.dtype], x.numel() // width, width,
        eps, offset, threads(),
    )  # fmt: skip
    return y


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty((q.shape[0], 1, q.shape[1], v.shape[3]))


def _normalise_fake(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return x.new_empty(x.shape)


_attend_op = register(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor", attend_plain, _attend_fake
)
_normalise_op = register(
    "normalise(Tensor x, Tensor weight, float eps, float offset) -> Tensor", normalise_plain, _normalise_fake
)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """As `attend_plain`, visible to whatever traces or watches; `scale` is 1 / sqrt(depth) unless given."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if is_plain(q) and type(k) is type(v) is Tensor:
        return attend_plain(q, k, v, mask, scale)
    y: Tensor = _attend_op(q, k, v, mask, scale)
    return y


def normalise(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """As `normalise_plain`, visible to whatever traces or watches."""
    if is_plain(x):
        return normalise_plain(x, weight, eps, offset)
    y: Tensor = _normalise_op(x, weight, eps, offset)
    return y

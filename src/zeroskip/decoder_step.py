"""One token of each sequence through a decoder layer in one call of the core, with no tensor between its parts.

transformers' forward of a Llama's layer is some ten calls of modules and thirty of torch around seven products. Here
norms, products, rotary positions written into the cache, attention and residuals follow one another in native code
(csrc/decoder), each with the bits of the module whose place it takes.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zeroskip import _core
from zeroskip.decoder_parts import Parts
from zeroskip.errors import ZeroskipError
from zeroskip.hf_cache import Place
from zeroskip.native import TYPES, aligned, fp32_bias, register, threads
from zeroskip.norm_layers import CONSTANTS

__all__ = ["Call", "DecoderStep", "decode", "run"]

NO_NORM = (0, 0, 0)
# Addresses, sizes, sizes of this call, numbers, kernels: csrc/bind says in which order.
Call = tuple[list[int], Sequence[int], list[int], Sequence[float], Sequence[str | None] | None]
Held = list[Tensor | None]
Seen = tuple[dict[str, Any], str, Any, int, torch.dtype | None]  # owner, name; what it was
_numbers = itertools.count()
_steps: weakref.WeakValueDictionary[int, DecoderStep] = weakref.WeakValueDictionary()


class Found(NamedTuple):
    """Where the parameters of a layer are: addresses as the core wants them, and the tensors that are there."""

    addresses: list[int]
    held: Held
    seen: list[Seen]

    def still(self) -> bool:
        """Return whether they are there yet: nobody has replaced, moved or cast one."""
        for owner, name, tensor, address, dtype in self.seen:
            now = owner[name]
            if now is not tensor:
                return False
            if now is not None and (now.data_ptr() != address or now.dtype is not dtype or not now.is_contiguous()):
                return False
        return True


class DecoderStep:
    """The step of one layer.

    Parameters
    ----------
    parts : Parts
        `depth` and `scale` are those of its attention module.

    Attributes
    ----------
    number : int
        By which the op finds the step while it lives: what is traced would otherwise pass on some twenty tensors a
        layer, and a small model spends more on them than on its products.

    Raises
    ------
    ZeroskipError
        If the sizes do not fit together.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.number = next(_numbers)
        _steps[self.number] = self
        q, k, v, _, gate, _, _ = (layer.out_features for layer in parts.products)
        depth, scale = (
            getattr(parts.attention, "head_dim", None),
            getattr(parts.attention, "scaling", None),
        )
        index = getattr(parts.attention, "layer_idx", None)
        if type(depth) is not int or type(scale) is not float or depth < 1 or q < depth or k < depth:
            raise ZeroskipError(f"an attention module of {q} numbers of queries with heads of {depth}, scale {scale}")
        if type(index) is not int:
            raise ZeroskipError(f"an attention module whose place among the layers is {index}")
        self.index: int = index
        heads, groups = q // depth, k // depth
        self.depth, self.heads, self.groups, self.width = (
            depth,
            heads,
            groups,
            v // groups,
        )
        self.hidden = hidden = parts.products[0].in_features
        sizes = [(layer.in_features, layer.out_features) for layer in parts.products]
        wide = heads * self.width
        fits = [
            (hidden, heads * depth),
            (hidden, groups * depth),
            (hidden, groups * self.width),
            (wide, hidden),
        ]
        if sizes != [*fits, (hidden, gate), (hidden, gate), (gate, hidden)] or heads % groups:
            raise ZeroskipError(f"products of {sizes} do not follow on one another")
        norms = [(0.0, 0.0) if norm is None else norm.__dict__[CONSTANTS] for norm in parts.all_norms]
        self.numbers = [scale, *(number for pair in norms for number in pair)]
        self.outputs = tuple(layer.out_features for layer in parts.products)
        self.found: Found | None = None
        self.shape = [
            heads,
            groups,
            depth,
            self.width,
            hidden,
            gate,
            *(layer._act for layer in parts.products),
        ]

    def prepare(
        self,
        x: Tensor,
        y: Tensor,
        cos: Tensor,
        sin: Tensor,
        place: Place,
        mask: Tensor | None,
    ) -> tuple[Call, Held]:
        """Return the call that writes what the layer returns to y, and what must live until it was made (`run`).

        Parameters
        ----------
        x : Tensor
            [batch, 1, hidden], contiguous, fp32, bf16 or fp16; the same holds of y. Not read before the call.
        cos, sin : Tensor
            [batch or 1, 1, turned] of x's dtype, contiguous; `turned` is even and at most the depth of a head.
        place : Place
            Where the keys and values of this token belong; they are written there, in x's dtype.
        mask : Tensor or None
            bool [batch or 1, 1, 1, place.token + 1], its last stride 1.
        """
        (keys, values, token), shape = place, self.shape
        address = mask_stride = 0
        if mask is not None:
            address, mask_stride = mask.data_ptr(), mask.stride(0) if mask.shape[0] > 1 else 0
        addresses = [
            x.data_ptr(), y.data_ptr(), cos.data_ptr(), sin.data_ptr(), keys.data_ptr(), values.data_ptr(), address,
        ]  # fmt: skip
        found = self.found
        if found is None or not found.still():
            found = self._find()
        turned = cos.shape[2]
        by, of = keys.stride(), values.stride()
        call = [
            TYPES[x.dtype], x.shape[0], token, turned, turned if cos.shape[0] > 1 else 0, mask_stride, *by[:3], *of[:3],
        ]  # fmt: skip
        kernels = [layer.kernel for layer in self.parts.products]
        addresses += found.addresses
        return (addresses, shape, call, self.numbers, kernels if any(kernels) else None), found.held

    def _find(self) -> Found:
        """Look where the parameters are now; remembered unless a copy had to be made of one."""
        products, norms = self.parts.products, [norm for norm in self.parts.all_norms if norm is not None]
        owners = [(each._parameters, name) for each in products for name in ("weight", "bias")]
        owners += [(norm._parameters, "weight") for norm in norms]
        seen: list[Seen] = [
            (owner, name, own, 0 if own is None else own.data_ptr(), None if own is None else own.dtype)
            for owner, name in owners
            for own in (owner[name],)
        ]
        addresses: list[int] = []
        held: Held = []
        for product, m in zip(products, self.outputs, strict=True):
            own: Any = product._parameters
            blob, bias, at = aligned(own["weight"]), own["bias"], 0
            if bias is not None:
                bias = fp32_bias(bias, m)
                at = bias.data_ptr()
            held += (blob, bias)
            addresses += (blob.data_ptr(), blob.numel(), at)
        for norm in self.parts.all_norms:
            if norm is None:
                addresses += NO_NORM
                continue
            weight: Any = norm._parameters["weight"]
            weight = weight.contiguous()
            held.append(weight)
            addresses += (weight.data_ptr(), TYPES.get(weight.dtype, 0), weight.numel())
        found = Found(addresses, held, seen)
        self.found = found if all(a is each[2] for a, each in zip(held, seen, strict=True)) else None
        return found


def run(calls: Sequence[Call]) -> None:
    """Make these calls, one layer after the other.

    Raises
    ------
    ZeroskipError
        For a weight that is no sound blob, or that has another shape than it had.
    """
    try:
        _core.decode(list(calls), threads())
    except ValueError as error:
        raise ZeroskipError(str(error)) from None


def _decode(
    x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, token: Tensor, mask: Tensor | None, number: int
) -> Tensor:
    """The op: checks what is given, for anybody may call it."""
    step = _steps.get(number)
    if step is None:
        raise ZeroskipError(f"decode: there is no layer {number} any more: compile the model anew")
    at, batch = int(token), x.shape[0]
    fits = (
        x.dtype in TYPES
        and x.shape[1:] == (1, step.hidden)
        and cos.shape == sin.shape
        and cos.dim() == 3
        and cos.shape[0] in (1, batch)
        and cos.shape[1] == 1
        and cos.shape[2] % 2 == 0
        and cos.shape[2] <= step.depth
        and keys.dim() == values.dim() == 4
        and keys.shape == (batch, step.groups, values.shape[2], step.depth)
        and values.shape == (batch, step.groups, keys.shape[2], step.width)
        and keys.stride(3) == values.stride(3) == 1
        and cos.dtype is sin.dtype is keys.dtype is values.dtype is x.dtype
        and 0 <= at < keys.shape[2]
    )
    if fits and mask is not None:
        fits = mask.dtype is torch.bool and mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.stride(3) == 1
        fits = fits and mask.shape[1:3] == (1, 1) and mask.shape[3] > at
    if not fits:
        given = [list(each.shape) for each in (x, cos, sin, keys, values)]
        raise ZeroskipError(f"decode: token {at} and tensors {given} do not fit the layer of sizes {step.shape[:6]}")
    x = x.contiguous()
    y = torch.empty_like(x)
    call, _held = step.prepare(x, y, cos.contiguous(), sin.contiguous(), Place(keys, values, at), mask)
    run([call])
    return y


def _decode_fake(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


decode = register(
    "decode(Tensor x, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor token, Tensor? mask, "
    "int number) -> Tensor",
    _decode,
    _decode_fake,
)

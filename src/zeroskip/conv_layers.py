"""A convolution as one product: its patches, laid out as rows, times a packed weight.

x [batch, channels, *space] -> patches [batch x positions, kernel positions x channels] -> y, which comes channels-last:
so the layer after it finds its patches as runs of memory, and of a 1 x 1 kernel with stride 1 nothing is copied at all.
The patches are cut by the native core as the kernel packs its input (csrc/patches.cpp), never as a whole.
"""

from __future__ import annotations

import copy
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from zeroskip.conv_ops import convolve
from zeroskip.errors import ZeroskipError
from zeroskip.formats.base import Packed
from zeroskip.nn import PackedLinear
from zeroskip.sites.conv import KINDS, Conv, ConvAdapter, blocks

__all__ = ["Geometry", "PackedConv", "channels_last", "geometry_of", "geometry_problem", "in_channels_last"]

Geometry: TypeAlias = dict[str, Any]
"""{"kernel_size", "stride", "dilation": one whole number an axis; "padding": two an axis, the last axis first;
"padding_mode": str, "groups": more than one, or absent}"""

MODES = ("zeros", "reflect", "replicate", "circular")
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def geometry_of(conv: Conv | PackedConv) -> Geometry:
    """Return what a convolution is besides its weight, as plain values for JSON."""
    more = {"groups": conv.groups} if conv.groups > 1 else {}  # without: as files were before there were any
    return more | {
        "kernel_size": list(conv.kernel_size),
        "stride": list(conv.stride),
        "dilation": list(conv.dilation),
        "padding": list(conv._reversed_padding_repeated_twice),
        "padding_mode": conv.padding_mode,
    }


def geometry_problem(given: Any) -> str | None:
    """Return what is wrong with a geometry that was read from a file, or None."""
    if not isinstance(given, dict):
        return f"conv is a {type(given).__name__}, not an object"
    sizes = given.get("kernel_size")
    axes = len(sizes) if isinstance(sizes, list) else 0
    if axes not in (1, 2, 3):
        return f"kernel_size {sizes!r} is not one to three whole numbers"
    for name in ("kernel_size", "stride", "dilation", "padding"):
        value, (count, least) = given.get(name), (2 * axes, 0) if name == "padding" else (axes, 1)
        if not isinstance(value, list) or [type(n) is int and least <= n < 1 << 31 for n in value] != [True] * count:
            return f"{name} {value!r} is not {count} whole numbers from {least} on"
    groups = given.get("groups", 2)
    if type(groups) is not int or not 2 <= groups < 1 << 31:
        return f"groups {groups!r} is not a whole number from 2 on"
    if given.get("padding_mode") not in MODES:
        return f"padding_mode {given.get('padding_mode')!r} is not one of {', '.join(MODES)}"
    return None


def channels_last(x: Tensor) -> Tensor:
    """Return x [batch, channels, *space] with its channels innermost in memory; x itself where it is so."""
    if x.dim() in FORMATS:
        return x.contiguous(memory_format=FORMATS[x.dim()])
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def in_channels_last(conv: nn.Module) -> nn.Module:
    """Return a copy of a convolution whose weight lies channels-last, which makes torch compute so."""
    new = copy.deepcopy(conv)
    weight = new.get_parameter("weight")
    weight.data = weight.data.contiguous(memory_format=FORMATS[weight.dim()])
    return new


class PackedConv(PackedLinear):
    """A convolution whose `weight` is a blob, int8 [nbytes], of the matrix over its patches.

    That of a convolution in groups is one matrix over all channels, with zeros where a group does not look.

    Parameters
    ----------
    in_features, out_features
        Kernel positions x channels; outputs.
    nbytes
        Length of the blob.
    geometry
        As `geometry_of` gives it.
    bias
        Whether there is a bias [out_features].
    """

    def __init__(
        self, in_features: int, out_features: int, nbytes: int, geometry: Geometry, bias: bool = False
    ) -> None:
        super().__init__(in_features, out_features, nbytes, bias)
        self.kernel_size: tuple[int, ...] = tuple(geometry["kernel_size"])
        self.stride: tuple[int, ...] = tuple(geometry["stride"])
        self.dilation: tuple[int, ...] = tuple(geometry["dilation"])
        self._reversed_padding_repeated_twice: list[int] = list(geometry["padding"])
        self.padding_mode: str = geometry["padding_mode"]
        self.groups: int = geometry.get("groups", 1)
        self.positions = 1
        for size in self.kernel_size:
            self.positions *= size
        around = self._reversed_padding_repeated_twice  # the last axis first, before and after
        before, after = around[-2::-2], around[::-2]
        # What the kernel's own gathering pads: zeros, as many on both sides of an axis.
        self._before = before if self.padding_mode == "zeros" and before == after else None
        self._sizes = [*self.kernel_size, *self.stride, *self.dilation, *(self._before or [0] * len(before))]
        self._plain = self.positions == 1 and set(self.stride) == {1} and not any(geometry["padding"])

    @classmethod
    def of(cls, conv: Conv, packed: Packed, bias: Tensor | None) -> PackedConv:
        """Wrap the packed matrix of a convolution; it and the bias are shared, not copied."""
        m, k = packed.shape
        module = cls(k, m, 0, geometry_of(conv))
        module.weight = nn.Parameter(packed.blob, requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    def forward(self, x: Tensor) -> Tensor:
        axes = len(self.kernel_size)
        batched = x.dim() == axes + 2
        if x.dim() not in (axes + 1, axes + 2) or x.shape[-axes - 1] * self.positions != self.in_features:
            channels = self.in_features // self.positions
            raise ZeroskipError(f"x is {list(x.shape)}: expected [batch, {channels}, ...] with {axes} axes of space")
        x = x if batched else x.unsqueeze(0)
        if self._plain:
            y = self.product(x.movedim(1, -1))
        else:
            if self._before is None:
                mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
                x = pad(x, self._reversed_padding_repeated_twice, mode=mode)
            own = self._parameters
            y = convolve(x.movedim(1, -1), own["weight"], own["bias"], self.out_features, self._sizes, self.kernel)
        y = y.movedim(-1, 1)
        return y if batched else y[0]

    def dense(self, weight: Tensor) -> nn.Module:
        """Return the convolution of torch with this matrix [m, k] as its weight, in that dtype."""
        axes, around = len(self.kernel_size), self._reversed_padding_repeated_twice
        each = [tuple(around[2 * axis : 2 * axis + 2]) for axis in reversed(range(axes))]
        same = all(before == after for before, after in each)
        kind: Any = KINDS[axes - 1]
        conv: nn.Module = kind(
            self.in_features // self.positions,
            self.out_features,
            self.kernel_size,
            self.stride,
            tuple(before for before, _ in each) if same else "same",
            self.dilation,
            self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device="meta",
            dtype=weight.dtype,
        )
        own = ConvAdapter.back(conv, "weight", blocks(weight, self.positions, self.groups)).contiguous()
        conv.weight = nn.Parameter(own, requires_grad=False)
        if self.bias is not None:
            conv.bias = nn.Parameter(cast(Tensor, self.bias).detach().to(weight.dtype), requires_grad=False)
        return conv

    def extra_repr(self) -> str:
        geometry = ", ".join(f"{name}={value}" for name, value in geometry_of(self).items())
        return f"{super().extra_repr()}, {geometry}"

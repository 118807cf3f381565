"""Convolutions as matrices over patches.

The weight [out, in / groups, *kernel] becomes [groups, out / groups, positions x in / groups]: kernel positions
outside, channels inside, so that the groups of an N:M pattern lie along the channels of one position. A patch is laid
out alike, and is one run of memory for each position where x is channels-last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from zeroskip.sites.base import Adapter, Call, Inputs, is_weight

__all__ = ["Conv", "ConvAdapter", "DepthwiseAdapter", "block_diagonal", "blocks", "patches"]

PIECE_BYTES = 64 << 20  # of patches at a time: they are several times as large as what they are cut from

Conv: TypeAlias = "nn.Conv1d | nn.Conv2d | nn.Conv3d"
KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ConvAdapter(Adapter):
    """nn.Conv1d, nn.Conv2d, nn.Conv3d with any stride, padding, dilation and groups."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return isinstance(module, KINDS) and is_weight(module, dims=2 + len(module.kernel_size))

    @staticmethod
    def view(module: nn.Module, parameter: str, value: Tensor) -> Tensor:
        groups = cast(Conv, module).groups
        outputs, channels = value.shape[:2]
        return value.flatten(2).transpose(1, 2).reshape(groups, outputs // groups, value[0, 0].numel() * channels)

    @staticmethod
    def back(module: nn.Module, parameter: str, matrices: Tensor) -> Tensor:
        conv = cast(Conv, module)
        channels = conv.in_channels // conv.groups
        return (
            matrices.reshape(conv.out_channels, -1, channels).transpose(1, 2).reshape(-1, channels, *conv.kernel_size)
        )

    @staticmethod
    def whole(module: nn.Module, parameter: str, matrices: Tensor) -> Tensor:
        conv = cast(Conv, module)
        return block_diagonal(matrices, math.prod(conv.kernel_size))

    @staticmethod
    def run(module: nn.Module, parameter: str, columns: int) -> int:
        conv = cast(Conv, module)
        return conv.in_channels // conv.groups

    @staticmethod
    def inputs(module: nn.Module, call: Call, wanted: Sequence[str]) -> Iterator[tuple[str, Inputs]]:
        conv, x = cast(Conv, module), call.x.detach()
        if x.dim() == len(conv.kernel_size) + 1:
            x = x.unsqueeze(0)
        several = max(1, PIECE_BYTES // max(1, x[0].numel() * x.element_size() * math.prod(conv.kernel_size)))
        for piece in x.split(several):
            yield "weight", patches(conv, piece)


class DepthwiseAdapter(ConvAdapter):
    """One channel a group: few weights, each of which matters, and no kernel would gain by their zeros."""

    asked: ClassVar[str] = "depthwise convolution"

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return ConvAdapter.matches(module) and 1 < cast(Conv, module).groups == cast(Conv, module).in_channels


def block_diagonal(matrices: Tensor, positions: int) -> Tensor:
    """Return the matrices [groups, out, positions x channels] of a convolution as one over all its channels.

    [groups x out, positions x groups x channels]: what a group does not see is zero, which sparse formats do not store.
    """
    groups, rows, columns = matrices.shape
    if groups == 1:
        return matrices[0]
    wide = matrices.new_zeros(groups, rows, positions, groups, columns // positions)
    for group, matrix in enumerate(matrices):
        wide[group, :, :, group] = matrix.view(rows, positions, -1)
    return wide.view(groups * rows, -1)


def blocks(matrix: Tensor, positions: int, groups: int) -> Tensor:
    """Undo `block_diagonal`."""
    rows, columns = matrix.shape
    wide = matrix.view(groups, rows // groups, positions, groups, columns // positions // groups)
    return torch.stack([wide[group, :, :, group] for group in range(groups)]).flatten(2)


def patches(conv: Conv, x: Tensor) -> Tensor:
    """Return what the matrices of a convolution multiply.

    Parameters
    ----------
    x : Tensor
        [batch, channels, *space], any memory format; not modified.

    Returns
    -------
    Tensor
        [groups, batch x positions of the output, kernel positions x channels / groups] in x's dtype.
    """
    around = conv._reversed_padding_repeated_twice
    if any(around):
        x = pad(x, around, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    for axis, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    space = len(conv.kernel_size)
    batch, channels = x.shape[:2]
    # [batch, channels, *out, *kernel] -> [groups, batch, *out, *kernel, channels / groups]
    x = x.reshape(batch, conv.groups, channels // conv.groups, *x.shape[2:])
    x = x.permute(1, 0, *range(3, 3 + 2 * space), 2)
    return x.reshape(conv.groups, math.prod(x.shape[1 : 2 + space]), math.prod(x.shape[2 + space :]))

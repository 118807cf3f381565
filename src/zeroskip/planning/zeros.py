"""What the zeros of a weight look like, read from the weight itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Zeros", "find_zeros"]

FULL = 0.9  # a pattern explains the zeros if what it keeps is at least this full
SAMPLE = 64  # rows
FEW = 0.02  # fewer zeros than this are no pattern
GROUPS = (2, 4, 8, 16, 32, 64)
STRIPS = (128, 64, 32, 16)
SQUARES = tuple((side, side) for side in (64, 32, 16, 8, 4))
BLOCKS = (*SQUARES, *((side, 1) for side in (32, 16, 8, 4)), *((1, side) for side in (32, 16, 8, 4)))


@dataclass(frozen=True)
class Zeros:
    """The zeros of one weight: a pattern's name, the fraction of zeros, the number of non-zeros."""

    pattern: str
    sparsity: float
    nnz: int


def find_zeros(weight: Tensor) -> Zeros:
    """Return what the zeros of weight [m, k] look like.

    ``'dense'`` with fewer than 2 % zeros; else the first of ``'N:M@V'`` (largest V, then smallest M), ``'block:RxC'``
    (largest first), ``'N:M'`` (smallest M) whose kept places are at least 90 % full; else ``'unstructured'``.
    """
    kept = weight != 0
    nnz = int(kept.sum())
    sparsity = 1.0 - nnz / max(weight.numel(), 1)
    if sparsity < FEW:
        return Zeros("dense", sparsity, nnz)
    if nnz == 0:
        return Zeros("unstructured", sparsity, nnz)
    return Zeros(_strips(kept, nnz) or _blocks(kept, nnz) or _rows(kept, nnz) or "unstructured", sparsity, nnz)


def _strips(kept: Tensor, nnz: int) -> str | None:
    for strip in STRIPS:
        if kept.shape[0] < strip:
            continue
        shared = _reduce_rows(kept, strip)
        heights = torch.full((shared.shape[0], 1), strip)
        heights[-1] = kept.shape[0] - strip * (shared.shape[0] - 1)
        if nnz < FULL * int((shared * heights).sum()):
            continue
        if (found := _n_of_m(shared, int(shared.sum()))) is not None:
            return f"{found}@{strip}"
    return None


def _rows(kept: Tensor, nnz: int) -> str | None:
    return _n_of_m(kept, nnz)


def _n_of_m(kept: Tensor, nnz: int) -> str | None:
    """Return the smallest N:M whose N M-ths of all places are filled by the non-zeros."""
    rows, k = kept.shape
    for m in GROUPS:
        if k % m:
            return None
        least = _most(kept[:SAMPLE], m)  # a few rows show for nearly every weight that there is no such pattern
        if least == m or nnz < FULL * rows * k * least / m:
            continue
        n = _most(kept, m)
        if n < m and nnz >= FULL * rows * k * n / m:
            return f"{n}:{m}"
    return None


def _most(kept: Tensor, m: int) -> int:
    """Return the most non-zeros that any M neighbours of a row have."""
    return int(kept.view(kept.shape[0], -1, m).sum(-1, dtype=torch.uint8).max())


def _blocks(kept: Tensor, nnz: int) -> str | None:
    for height, width in BLOCKS:
        if kept.shape[0] % height or kept.shape[1] % width:
            continue
        blocks = kept.view(kept.shape[0] // height, height, kept.shape[1] // width, width)
        used = int(blocks.any(dim=3).any(dim=1).sum()) * height * width
        if nnz >= FULL * used:
            return f"block:{height}x{width}"
    return None


def _reduce_rows(kept: Tensor, strip: int) -> Tensor:
    full = kept.shape[0] // strip * strip
    shared = kept[:full].view(-1, strip, kept.shape[1]).any(dim=1)
    return shared if full == kept.shape[0] else torch.cat([shared, kept[full:].any(dim=0, keepdim=True)])

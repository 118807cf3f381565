"""Codes and scales of foreign formats: what they mean as weights, and what of them our packing can use again."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from zeroskip.convert.base import Stored

__all__ = ["check_grid", "dequantize", "group_size_of", "keep_scales", "schemes", "spread", "unpack_words", "words_for"]

SIZES = (128, 64, 32)  # what our formats can share a scale among, the largest first


def schemes(stored: Stored, key: str) -> list[Any]:
    """Return what the groups of the quantisation config say of weights under `key`, each value once."""
    groups = (stored.config.get("quantization_config") or {}).get("config_groups")
    found: list[Any] = []
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        value = weights.get(key) if isinstance(weights, dict) else None
        if value is not None and value not in found:
            found.append(value)
    return found


def words_for(count: int, bits: int, stream: bool = False) -> int:
    """Return how many int32 words hold `count` fields: each whole in its word, or (`stream`) bit after bit."""
    return -(-count * bits // 32) if stream else -(-count // (32 // bits))


def unpack_words(words: Tensor, bits: int, stream: bool = False) -> Tensor:
    """Return the unsigned fields of int32 words [rows, n] as int32 [rows, at least as many as there are].

    Low bits first; each field whole in its word with what is left of it empty, or (`stream`) bit after bit, so that
    fields may begin in one word and end in the next. For 1, 2, 4 and 8 bits that is the same.
    """
    if not stream:
        shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
        return ((words.unsqueeze(2) >> shifts) & ((1 << bits) - 1)).view(len(words), -1)
    first = torch.arange(words.shape[1] * 32 // bits) * bits
    wide = torch.nn.functional.pad(words, (0, 1)).long()
    pair = (wide[:, :-1] & 0xFFFFFFFF) | (wide[:, 1:] << 32)
    return ((pair[:, first // 32] >> first % 32) & ((1 << bits) - 1)).int()


def group_size_of(stored: Stored, groups: int, columns: int) -> int | None:
    """Return how many of `columns` inputs share one of `groups` scales, None if that does not come out."""
    told = [size for size in schemes(stored, "group_size") if type(size) is int and size > 0]
    fits = [size for size in told if -(-columns // size) == groups]
    if groups == 1:
        return columns
    return fits[0] if fits else columns // groups if columns % groups == 0 else None


def check_grid(stored: Stored, name: str, scale: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """Return how many (rows, columns) of a weight of this shape share a scale.

    Raises
    ------
    ZeroskipError
        If scales of that shape cannot belong to it.
    """
    rows, columns = shape
    down, across = (1, 1) if prod(scale) == 1 else scale if len(scale) == 2 else (*scale, 1)[:2]
    width = group_size_of(stored, across, columns) if 0 < across <= columns else None
    if len(scale) > 2 or width is None or not 0 < down <= rows or rows % down:
        raise stored.bad(name, f"scales {list(scale)} cannot belong to a weight {list(shape)}")
    return rows // down, width


def spread(scale: Tensor, grid: tuple[int, int], shape: tuple[int, ...], order: Tensor | None = None) -> Tensor:
    """Return the scale of every weight; `order` [in] says which group an input belongs to, if not the next ones."""
    rows, columns = shape
    wide = scale.reshape(-(-rows // grid[0]), -1).repeat_interleave(grid[0], 0)
    return wide[:, order.long()] if order is not None else wide.repeat_interleave(grid[1], 1)[:, :columns]


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Return (codes - zero) * scale in the dtype of the scales, all [out, in]; a zero is +0.0."""
    weight = codes.to(scale.dtype)
    if zero is not None:
        weight = weight - zero.to(scale.dtype)
    return weight * scale + 0.0


def keep_scales(stored: Stored, site: str, scale: Tensor, grid: tuple[int, int], shape: tuple[int, ...]) -> None:
    """Keep the scales of a site in the groups that our packing knows, where they can be cut into such."""
    rows, columns = shape
    size = next((size for size in SIZES if grid[1] % size == 0 or grid[1] >= columns), None)
    if size is None:
        stored.notes.append(f"{site}: one scale for {grid[1]} inputs; packing will round it again")
        return
    wide = scale.reshape(-(-rows // grid[0]), -1).repeat_interleave(grid[0], 0)
    count = -(-columns // size)
    wide = wide.repeat_interleave(-(-grid[1] // size), 1)[:, :count]
    wide = torch.where(wide == 0, torch.ones_like(wide), wide)  # a group of zeros
    if not bool((torch.isfinite(wide) & (wide > 0)).all()):
        stored.notes.append(f"{site}: a scale is negative or not finite; packing will round it again")
        return
    stored.scales[site] = wide.contiguous().unsqueeze(0)

"""What a replay remembers: the blocks, what their calls returned, and how one plain forward went."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ["Block", "Record", "Trace", "copied"]


@dataclass(frozen=True, eq=False)
class Block:
    """A module whose calls are replayed. `group` is the list it came from; "" as name is the whole model."""

    name: str
    module: nn.Module
    group: str


@dataclass
class Record:
    """What the finished calls of one batch returned, in call order."""

    blocks: list[Block] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


@dataclass
class Trace:
    """One plain forward: which block each call ran, digests of its arguments, which outputs later calls read."""

    blocks: list[Block] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    read: set[tuple[int, int]] = field(default_factory=set)  # (call, output leaf)


def copied(leaf: Any) -> Any:
    """A copy of an output, because the model's glue may write into what it gets."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf

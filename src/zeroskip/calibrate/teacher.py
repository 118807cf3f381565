"""What a block would have returned in the dense model, beside what it is called with in the pruned one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from zeroskip.calibrate.fp32 import to_fp32
from zeroskip.calibrate.replay import Block, Record, Replay

__all__ = ["Lesson", "Teacher", "first_tensor"]


@dataclass(frozen=True)
class Lesson:
    """One call of a block.

    Attributes
    ----------
    args, kwargs
        What the pruned model calls the block with.
    target : Tensor
        The first tensor that the block of the dense model returns for the same batch.
    visible : Tensor or None
        bool over the leading dimensions of `target`, False where a token is padding.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Tensor
    visible: Tensor | None


class Teacher:
    """The dense model's own way through the blocks: a second set of outputs beside those of the pruned model.

    Parameters
    ----------
    replay : Replay
        Of the pruned model. `learn` is to be called for each block in its order, while the block is still dense.
    """

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.records = [Record() for _ in replay.batches]
        self.targets: list[Tensor | None] = []

    def learn(self, block: Block) -> None:
        """Take every batch through `block`, which is still dense, and keep what it returns."""
        self.targets = []
        with self.replay.wide.hold(block.module):
            for index, batch in enumerate(self.replay.batches):
                record = self.replay.passed(batch, self.records[index], block)
                mine = [output for each, output in zip(record.blocks, record.outputs, strict=True) if each is block]
                self.targets.append(first_tensor(mine[0]) if len(mine) == 1 else None)
                self.records[index] = record

    def final(self, index: int) -> Lesson | None:
        """Return what the dense model returns for one batch, once `learn` has seen its last block with sites.

        None where that block is not called exactly once. What follows it runs as it is now, and in fp32, in which the
        model is to be held meanwhile.
        """
        if self.targets[index] is None:
            return None
        batch = self.replay.batches[index].in_fp32()
        record = Record(self.records[index].blocks, pytree.tree_map(to_fp32, self.records[index].outputs))
        target = first_tensor(self.replay.finished(batch, record))
        if target is None:
            return None
        args, kwargs = batch.moved(self.replay.model)
        return Lesson(args, kwargs, target, batch.visible(target, {}, self.replay.two_towers))

    def lesson(self, block: Block, index: int) -> Lesson | None:
        """Return the lesson of one batch; None where the block is not called exactly once."""
        target = self.targets[index]
        if target is None:
            return None
        args, kwargs = self.replay.call_of(block, index)
        names = inspect.signature(block.module.forward).bind_partial(*args, **kwargs).arguments
        mask = self.replay.batches[index].visible(target, names, self.replay.two_towers)
        return Lesson(args, kwargs, target, mask)


def first_tensor(output: Any) -> Tensor | None:
    """Return the first floating-point tensor of a block's output."""
    leaves = (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    return next((leaf for leaf in leaves if torch.is_floating_point(leaf)), None)

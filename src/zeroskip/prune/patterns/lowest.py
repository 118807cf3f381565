"""Exactly as many of the lowest scores as were asked; of equal ones the lower index is kept."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["lowest", "lowest_by_row"]


def lowest(score: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest of every row of `score` [rows, n]; of equal scores the higher index goes first."""
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    limit = score.kthvalue(count, dim=1, keepdim=True).values
    below, equal = score < limit, score == limit
    room = count - below.sum(1, keepdim=True)
    from_the_right = equal.flip(1).cumsum(1, dtype=torch.int32).flip(1)
    return below | (equal & (from_the_right <= room))


def lowest_by_row(score: Tensor, total: int) -> Tensor:
    """Mark the `total` lowest of `score` [rows, n], equally many in each row up to one."""
    each, rest = divmod(total, len(score))
    marked = lowest(score, each)
    if rest:
        following = score.masked_fill(marked, torch.inf).amin(1)
        extra = lowest(following.unsqueeze(0), rest)[0]
        marked[extra] = lowest(score[extra], each + 1)
    return marked

"""Transposable N:M, "N:Mt": N of every M consecutive inputs of a row, and N of every M consecutive rows of an input.

So the matrix and its transpose both have the pattern, and forward and backward products can both use it. In each
M x M block it is an N-regular bipartite graph between rows and columns, and the best one is found exactly: where M is
at most 4 by looking at all of them, else from a feasible start by cancelling cycles. A cycle of rows i -> j -> ... -> i
hands one kept column from each to the next, which leaves every count as it is; a choice is the best one if and only if
no cycle gains (it is a minimum cost flow). Shortest cycles first: the first closed walk that gains has no shorter one
inside, so it visits no row twice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

from zeroskip.errors import ZeroskipError
from zeroskip.prune.patterns.base import Pattern, Scope, multiple_of
from zeroskip.prune.patterns.nm import PAIR, Kept

__all__ = ["Transposable", "best_regular"]

LARGEST = 32  # M; every step of every walk costs M^3 a block
LISTED = 4  # up to this M all masks are looked at: 90 at 2:4
AT_ONCE = 1 << 22  # numbers in one array of walks
GAIN = 1e-6  # a cycle counts, for each of its rows, as a part of the block's largest score: what fp32 can tell


@dataclass(frozen=True)
class Transposable(Kept):
    """`kept` of every `of` along rows and along columns.

    Source: Hubara et al. 2021 (arXiv 2102.08124) pose it as a flow and solve it within a factor of two; here exactly.
    """

    examples = ("2:4t",)

    @classmethod
    def read(cls, text: str) -> Pattern | None:
        found = re.fullmatch(rf"{PAIR}t(@[0-9]{{1,9}})?", text)
        if found is None:
            return None
        kept, of = Kept.pair(text, found[1], found[2])
        if found[3]:
            raise ZeroskipError(f"pattern {text!r}: a strip has equal rows, which are not transposable: leave one out")
        if of > LARGEST:
            raise ZeroskipError(f"pattern {text!r}: transposable N:M goes up to M = {LARGEST}")
        return Transposable(text, kept, of)

    def with_kept(self, kept: int) -> Transposable:
        return Transposable(f"{kept}:{self.of}t", kept, self.of)

    def check(self, shape: tuple[int, ...], name: str) -> None:
        multiple_of(name, shape[-2], "outputs", self.of, self.name)
        multiple_of(name, shape[-1], "inputs", self.of, self.name)

    def select(self, score: Tensor, sparsity: float, scope: Scope = "tensor") -> Tensor:
        down, across = (size // self.of for size in score.shape)
        blocks = score.float().reshape(down, self.of, across, self.of).transpose(1, 2).reshape(-1, self.of, self.of)
        keep = best_regular(blocks, self.kept).view(down, across, self.of, self.of)
        return keep.transpose(1, 2).reshape(score.shape)


def best_regular(score: Tensor, kept: int) -> Tensor:
    """Choose the N in every row and every column of each block whose scores have the largest sum.

    Parameters
    ----------
    score : Tensor
        [blocks, M, M] fp32; not modified.
    kept : int
        N, from 1 to M.

    Returns
    -------
    Tensor
        [blocks, M, M] bool.
    """
    of = score.shape[2]
    if kept == of:
        return torch.ones_like(score, dtype=torch.bool)
    if of <= LISTED:
        masks = _listed(kept, of).to(score.device)
        sums = masks.flatten(1).t().to(score.dtype)
        best = [(part @ sums).argmax(1) for part in torch.split(score.flatten(1), AT_ONCE // len(masks))]
        return masks[torch.cat(best)]
    size = score.abs().amax((1, 2), keepdim=True)
    score = score / torch.where(size > 0, size, 1.0)
    parts = [_cancelled(part, _feasible(part, kept)) for part in torch.split(score, max(1, AT_ONCE // of**3))]
    return torch.cat(parts)


@cache
def _listed(kept: int, of: int) -> Tensor:
    """[masks, M, M] bool, all of them."""
    rows = [[column in chosen for column in range(of)] for chosen in combinations(range(of), kept)]
    found = [
        mask for mask in product(rows, repeat=of) if all(sum(column) == kept for column in zip(*mask, strict=True))
    ]
    return torch.tensor(found)


def _feasible(score: Tensor, kept: int) -> Tensor:
    """Fill row after row with its best columns; columns that need every row that is left come first."""
    blocks, of, _ = score.shape
    keep = torch.zeros_like(score, dtype=torch.bool)
    room = torch.full((blocks, of), kept, device=score.device)
    for row in range(of):
        worth = score[:, row].masked_fill(room == of - row, torch.inf).masked_fill(room == 0, -torch.inf)
        keep[:, row].scatter_(1, worth.topk(kept, dim=1).indices, True)
        room -= keep[:, row].int()
    return keep


def _cancelled(score: Tensor, keep: Tensor) -> Tensor:
    """Cancel cycles that gain until none is left; each round one in every block that has one."""
    of = score.shape[2]
    active = torch.arange(len(score), device=score.device)
    while len(active):
        here, on = score[active], keep[active]
        give, take = here.neg().masked_fill(~on, -torch.inf), here.masked_fill(on, -torch.inf)
        gain, column = (give.unsqueeze(2) + take.unsqueeze(1)).max(3)  # [blocks, from row, to row]
        rest, walk, before = torch.arange(len(active), device=score.device), gain, list[Tensor]()
        again = []
        for length in range(2, of + 1):
            walk, via = (walk.unsqueeze(3) + gain[rest].unsqueeze(1)).max(2)
            before.append(via)
            best, start = walk.diagonal(dim1=1, dim2=2).max(1)
            found = best > GAIN * length  # so that no walk is a sum of cycles, none of which counts
            if bool(found.any()):
                blocks = rest[found]
                done = _hand_on(keep, active[blocks], start[found], [each[found] for each in before], column[blocks])
                again.append(blocks[done])
                rest, walk, before = rest[~found], walk[~found], [each[~found] for each in before]
            if not len(rest):
                break
        active = active[torch.cat(again)] if again else active[:0]
    return keep


def _hand_on(keep: Tensor, blocks: Tensor, start: Tensor, before: list[Tensor], column: Tensor) -> Tensor:
    """Change `keep` along the cycles that end where they start, `before` the rows they came through.

    Returns [blocks] bool: False where rounding made a cycle of one that visits a row twice; that block stays as it was.
    """
    old = keep[blocks]
    new = old.clone()
    every, to = torch.arange(len(start), device=start.device), start
    for via in reversed([start.view(-1, 1, 1).expand_as(before[0]), *before]):
        source = via[every, start, to]
        moved = column[every, source, to]
        new[every, source, moved] = False
        new[every, to, moved] = True
        to = source
    done = torch.logical_and(*((new.sum(side) == old.sum(side)).all(1) for side in (1, 2)))
    keep[blocks[done]] = new[done]
    return done

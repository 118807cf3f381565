"""Column OBS: remove one input column of a strip at a time, the one whose loss the others can best make up for.

With H = G + lambda diag(G) and w the strip's rows, removing column j costs

    sum over rows w_j^2 / [H^-1]_jj,   and the rest moves by   w <- w - w_j [H^-1]_j: / [H^-1]_jj,

after which column j leaves H^-1 by one rank-one update. Unlike a sum of Wanda scores, this sees that two columns that
say the same are not both needed. A group of M never falls below its N; unstructured, every row is a strip of its own.
All strips of a slice go in step, each with its own H^-1. A removal needs one column of it and its diagonal only, so the
rank-one updates wait until there are 16 of them, and one product of matrices makes them all: updating at each removal
reads and writes 8 k^3 (1 - density^3) / 3 bytes a strip, this a sixteenth of it, and the same again for 64 rows of
weights. The results are the same but for rounding. Columns that are gone are dropped from the arrays now and then.
Slices hold at most 16 MB; each is a thread's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeroskip.prune.base import Method, Problem, Solution
from zeroskip.prune.numerics import inverse, unit_gram
from zeroskip.prune.patterns import NM, Block, Pattern, Split
from zeroskip.prune.threads import own_threads

RIDGE = 0.01
SLICE_BYTES = 16 << 20
PANEL = 16  # updates of H^-1 that are made at once
PART = 8  # arrays are compacted each time an eighth of their columns is gone


class Obs(Method):
    """Serves N:M, N:M@V, both beside a dense part, unstructured and blocks of one column; these two with equal counts
    in all strips.

    Source: group Optimal Brain Surgeon (Hassibi and Stork 1993; Frantar and Alistarh 2022, arXiv 2208.11580); ours
    removes whole columns of a strip under the N:M bound.
    """

    name = "obs"
    needs = ("gram",)

    def serves(self, pattern: Pattern) -> bool:
        narrow = isinstance(pattern, Block) and pattern.width == 1 and pattern.scope in (None, "row")
        return narrow or isinstance(pattern, NM | Split)

    def run(self, problem: Problem) -> Solution:
        pattern = problem.pattern
        unit, scale = unit_gram(problem.stats["gram"])
        start, notes = inverse(unit, RIDGE, problem.name)
        weight = problem.weight * scale
        keep = torch.ones_like(weight, dtype=torch.bool)
        lines: Tensor | slice = slice(None)
        dense = None
        if isinstance(pattern, Split):  # its dense part: rows that are left out, or columns that stay
            region, pattern = pattern.dense(weight.square()), pattern.rest
            lines, dense = ~region.all(1), region.all(0)
        weight[lines], keep[lines] = _removed(weight[lines], start, pattern, problem.sparsity, dense)
        return Solution(keep, (weight / scale).masked_fill(~keep, 0.0), notes)


def _removed(
    weight: Tensor, inverse: Tensor, pattern: Pattern, sparsity: float, dense: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return [out, in] weights and [out, in] bool what is kept; [in] bool `dense` marks groups of M that stay whole."""
    rows, k = weight.shape
    height = pattern.rows
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -rows % height))
    strips = padded.view(-1, height, k)
    if isinstance(pattern, NM):
        free = k if dense is None else k - int(dense.sum())
        steps, rest = free // pattern.of * (pattern.of - pattern.kept), 0
    else:
        steps, rest = divmod(round(len(strips) * k * sparsity), len(strips))
    each = max(1, SLICE_BYTES // (4 * k * k))
    parts = [_Strips(part, inverse, pattern, dense) for part in torch.split(strips, each)]
    with own_threads() as run:
        ends = list(run(lambda part: part.remove(steps, bool(rest)), parts))
    moved, kept = (torch.cat(tensors) for tensors in zip(*(end[:2] for end in ends), strict=True))
    if rest:  # the strips whose next column costs least lose one more
        further, fewer, cost = (torch.cat(tensors) for tensors in zip(*(end[2:] for end in ends), strict=True))
        extra = cost.argsort(stable=True)[:rest]
        moved[extra], kept[extra] = further[extra], fewer[extra]
    return moved.view(-1, k)[:rows], kept.repeat_interleave(height, 0)[:rows]


class _Strips:
    """A slice of strips that lose their columns in step.

    Attributes
    ----------
    weight : Tensor
        [strips, rows, left] what is left, in units where G has a unit diagonal.
    inverse : Tensor
        [strips, left, left] H^-1 of each strip over the same columns, less the updates that wait.
    lines : list of Tensor
        [strips, left] each: the updates that wait; H^-1 is `inverse` less the sum of their outer products.
    diagonal : Tensor
        [strips, left] of H^-1, nothing waiting.
    index : Tensor
        [strips, left] int64 which columns they are.
    alive : Tensor
        [strips, left] bool, False for columns that went since the arrays were compacted.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, pattern: Pattern, dense: Tensor | None) -> None:
        count, _, k = weight.shape
        self.k = k
        self.start = inverse
        self.weight = weight.clone()
        self.index = torch.arange(k, device=weight.device).repeat(count, 1)
        self.alive = torch.ones_like(self.index, dtype=torch.bool)
        self.every = torch.arange(count, device=weight.device)
        self.nm = pattern if isinstance(pattern, NM) else None
        of = self.nm.of if self.nm is not None else k
        self.room = torch.full((count, k // of), of, device=weight.device)  # alive columns of each group
        if self.nm is not None and dense is not None:
            self.room[:, dense.view(-1, of)[:, 0]] = self.nm.kept  # so none of them may go

    def remove(self, steps: int, further: bool) -> tuple[Tensor, ...]:
        """Remove `steps` columns of every strip.

        Returns
        -------
        tuple of Tensor
            [strips, rows, k] weights and [strips, k] bool what is kept; with `further` the same after one more column,
            and its cost, [strips].
        """
        self.inverse = self.start.repeat(len(self.every), 1, 1)
        self.diagonal = self.inverse.diagonal(dim1=1, dim2=2).clone()
        self.lines: list[Tensor] = []
        until = 0
        for step in range(steps):
            if step >= until:
                self._compact()
                until = step + max(1, self.weight.shape[2] // PART)
            self._step()
        ended: tuple[Tensor, ...] = self._whole()
        if further:
            cost = self._step()
            ended = (*ended, *self._whole(), cost)
        del self.inverse, self.diagonal, self.lines
        return ended

    def _step(self) -> Tensor:
        """Remove the cheapest column of every strip; return its cost, [strips]."""
        every, alive = self.every, self.alive
        if self.nm is not None:
            group = self.index // self.nm.of
            free = alive & (self.room.gather(1, group) > self.nm.kept)
        else:
            free = alive
        losses = self.weight.square().sum(1) / self.diagonal
        cost, column = losses.masked_fill(~free, torch.inf).min(1)
        line = self._column(column)
        line = line / line[every, column].sqrt().unsqueeze(1)
        pull = self.weight[every, :, column] / line[every, column].unsqueeze(1)
        self.weight.baddbmm_(pull.unsqueeze(2), line.unsqueeze(1), alpha=-1)
        self.weight[every, :, column] = 0.0
        self.diagonal -= line.square()
        self.lines.append(line)
        alive[every, column] = False
        if self.nm is not None:
            self.room[every, group[every, column]] -= 1
        if len(self.lines) == PANEL:
            self._update()
        return cost

    def _column(self, column: Tensor) -> Tensor:
        """Return one column of each strip's H^-1, with what waits; 0 where columns are gone."""
        found = self.inverse[self.every, column]
        if self.lines:
            waiting = torch.stack(self.lines, 1)
            at = waiting[self.every, :, column].unsqueeze(1)
            found = found - torch.bmm(at, waiting).squeeze(1)
        return found.masked_fill(~self.alive, 0.0)

    def _update(self) -> None:
        """Make the updates of H^-1 that wait."""
        if self.lines:
            waiting = torch.stack(self.lines, 1)
            self.inverse.baddbmm_(waiting.mT, waiting, alpha=-1)
            self.diagonal = self.inverse.diagonal(dim1=1, dim2=2).clone()
            self.lines = []

    def _compact(self) -> None:
        if bool(self.alive.all()):
            return
        self._update()
        count, rows, _ = self.weight.shape
        on = self.alive.nonzero()[:, 1].view(count, -1)
        left = on.shape[1]
        self.weight = self.weight.gather(2, on.unsqueeze(1).expand(-1, rows, -1))
        lines = self.inverse.gather(1, on.unsqueeze(2).expand(-1, -1, self.inverse.shape[2]))
        self.inverse = lines.gather(2, on.unsqueeze(1).expand(-1, left, -1))
        self.diagonal = self.diagonal.gather(1, on)
        self.index = self.index.gather(1, on)
        self.alive = self.alive.new_ones(count, left)

    def _whole(self) -> tuple[Tensor, Tensor]:
        count, rows, _ = self.weight.shape
        weight = self.weight.new_zeros(count, rows, self.k)
        weight.scatter_(2, self.index.unsqueeze(1).expand(-1, rows, -1), self.weight)
        kept = self.alive.new_zeros(count, self.k).scatter_(1, self.index, self.alive)
        return weight, kept

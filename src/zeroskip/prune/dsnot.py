"""DSnoT: from Wanda's mask, swap zeros and weights so that the mean output of each row comes back; no weight moves.

A row's mean output is off by eps = sum over its zeros of w_j mean(x_j). As often as it helps, the zero whose return
reduces |eps| most for its variance, w_j mean(x_j) / Var(x_j), returns, and the kept weight of the lowest Wanda score
among those whose going pulls the same way goes in its place: in the same group of M where the pattern is N:M. A row
stops when |eps| is down to a tenth, when a swap would not lower it, or when nothing of the right sign is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeroskip.prune.base import Method, Problem, Solution
from zeroskip.prune.patterns import NM, Block, Pattern, Split

ROUNDS = 50
ENOUGH = 0.1


class DSnoT(Method):
    """Serves what swaps in a row leave whole: unstructured, N:M, and a split with N:M.

    Source: Zhang et al. 2023, Dynamic Sparse No Training (arXiv 2310.08915); ours takes the threshold relative to where
    the row began, so that the scale of the data does not matter.
    """

    name = "dsnot"
    needs = ("sum", "sumsq")
    scope = "row"

    def serves(self, pattern: Pattern) -> bool:
        single = isinstance(pattern, Block) and pattern.width == 1
        return pattern.rows == 1 and (single or isinstance(pattern, NM | Split))

    def run(self, problem: Problem) -> Solution:
        weight, sumsq = problem.weight, problem.stats["sumsq"]
        tokens = max(problem.tokens, 1)
        mean = problem.stats["sum"] / tokens
        spread = (sumsq / tokens - mean.square()).clamp_min(1e-12 * float(sumsq.max()) / tokens + 1e-30)
        wanda = weight.square() * sumsq
        keep = problem.pattern.select(wanda, problem.sparsity, self.scope)
        of = problem.pattern.together or weight.shape[1]
        keep = _swap(keep, weight * mean, weight * mean / spread, wanda, of)
        return Solution(keep, weight.masked_fill(~keep, 0.0))


def _swap(keep: Tensor, pull: Tensor, order: Tensor, wanda: Tensor, of: int) -> Tensor:
    """Swap in all rows at once.

    Parameters
    ----------
    keep : Tensor
        [out, in] bool where it begins; not modified.
    pull : Tensor
        [out, in] what each weight adds to the mean output of its row.
    order : Tensor
        [out, in] the same for each unit of variance.
    wanda : Tensor
        [out, in] score of what may go.
    of : int
        How many inputs make a group in which swaps stay.
    """
    keep = keep.clone()
    every = torch.arange(len(keep), device=keep.device)
    group = torch.arange(keep.shape[1], device=keep.device) // of
    gap = pull.masked_fill(keep, 0.0).sum(1)
    enough = ENOUGH * gap.abs()
    running = gap.abs() > 0
    for _ in range(ROUNDS):
        sign = gap.sign().unsqueeze(1)
        back = (order * sign).masked_fill(keep | (pull * sign <= 0), -torch.inf)
        worth, grown = back.max(1)
        same = group == group[grown].unsqueeze(1)
        gone = wanda.masked_fill(~(keep & same & (pull * sign < 0)), torch.inf)
        least, pruned = gone.min(1)
        after = gap - pull[every, grown] + pull[every, pruned]
        running = running & torch.isfinite(worth) & torch.isfinite(least) & (after.abs() < gap.abs())
        if not bool(running.any()):
            break
        rows = every[running]
        keep[rows, grown[running]] = True
        keep[rows, pruned[running]] = False
        gap = torch.where(running, after, gap)
        running = running & (gap.abs() > enough)
    return keep

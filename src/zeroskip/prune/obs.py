"""Column OBS: remove one input column of a strip at a time, the one whose loss the others can best make up for.

With H = G + lambda diag(G) and w the strip's rows, removing column j costs

    sum over rows w_j^2 / [H^-1]_jj,   and the rest moves by   w <- w - w_j [H^-1]_j: / [H^-1]_jj,

after which column j leaves H^-1 by one rank-one update. Unlike a sum of Wanda scores, this sees that two columns that
say the same are not both needed. A group of M never falls below its N. All strips of a slice go in step: each has its
own H^-1, k^2 floats, and every one of the k (1 - N/M) steps reads and writes it once, so a strip costs about
8 k^3 (1 - N/M) bytes of memory traffic; slices hold at most 256 MB.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from zeroskip.prune.base import Method, Problem, Solution
from zeroskip.prune.patterns import NM, Pattern

RIDGE = 0.01
SLICE_BYTES = 256 << 20


class Obs(Method):
    """Serves N:M and N:M@V.

    Source: group Optimal Brain Surgeon (Hassibi and Stork 1993; Frantar and Alistarh 2022, arXiv 2208.11580); ours
    removes whole columns of a strip under the N:M bound.
    """

    name = "obs"
    needs = ("gram",)

    def serves(self, pattern: Pattern) -> bool:
        return isinstance(pattern, NM)

    def run(self, problem: Problem) -> Solution:
        pattern = cast(NM, problem.pattern)
        rows, k = problem.weight.shape
        gram = problem.stats["gram"]
        scale = gram.diagonal().sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        unit = (gram / scale / scale.unsqueeze(1)).double()
        inverse = torch.linalg.inv(unit + RIDGE * torch.eye(k, dtype=unit.dtype, device=unit.device)).float()

        height = pattern.rows
        padded = torch.nn.functional.pad(problem.weight * scale, (0, 0, 0, -rows % height))
        strips = padded.view(-1, height, k).clone()
        kept = torch.empty(len(strips), k, dtype=torch.bool, device=strips.device)
        each = max(1, SLICE_BYTES // (4 * k * k))
        for first in range(0, len(strips), each):
            part = slice(first, first + each)
            kept[part] = _remove(strips[part], inverse.repeat(len(strips[part]), 1, 1), pattern)
        keep = kept.repeat_interleave(height, 0)[:rows]
        weight = strips.view(-1, k)[:rows] / scale
        return Solution(keep, weight.masked_fill(~keep, 0.0))


def _remove(strips: Tensor, inverse: Tensor, pattern: NM) -> Tensor:
    """Remove columns until every group of M is down to N.

    Parameters
    ----------
    strips : Tensor
        [strips, rows, k] the weights, in units where G has a unit diagonal; changed in place.
    inverse : Tensor
        [strips, k, k] H^-1 of each strip; changed in place.

    Returns
    -------
    Tensor
        [strips, k] bool, the columns that are kept.
    """
    count, _, k = strips.shape
    every = torch.arange(count, device=strips.device)
    group = torch.arange(k, device=strips.device) // pattern.of
    left = torch.full((count, k // pattern.of), pattern.of, device=strips.device)
    kept = torch.ones(count, k, dtype=torch.bool, device=strips.device)
    for _ in range(k // pattern.of * (pattern.of - pattern.kept)):
        pivots = inverse.diagonal(dim1=1, dim2=2)
        free = kept & (left > pattern.kept)[:, group]
        cost = (strips.square().sum(1) / pivots).masked_fill(~free, torch.inf)
        column = cost.argmin(1)
        line = inverse[every, column]
        line = line / line[every, column].sqrt().unsqueeze(1)
        pull = strips[every, :, column] / line[every, column].unsqueeze(1)
        strips.baddbmm_(pull.unsqueeze(2), line.unsqueeze(1), alpha=-1)
        inverse.baddbmm_(line.unsqueeze(2), line.unsqueeze(1), alpha=-1)
        strips[every, :, column] = 0.0
        inverse[every, column] = 0.0
        inverse[every, :, column] = 0.0
        inverse[every, column, column] = 1.0
        kept[every, column] = False
        left[every, group[column]] -= 1
    return kept

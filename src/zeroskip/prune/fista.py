"""FISTA: an l1 penalty drives weights to zero while the output stays near; what is left is cut to the pattern.

    minimise  1/2 ||(W - W_0) X||^2 + lambda sum_ij n_j |W_ij|,   n_j = sqrt(G_jj),

by accelerated proximal gradients in units where n = 1. Each lambda starts from where the last one ended; of all the
cuts the one with the least output error is kept. It is one whose lambda zeroes fewer weights than are to go: a larger
one shrinks what stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeroskip.prune.base import Method, Problem, Solution
from zeroskip.prune.numerics import unit_gram
from zeroskip.prune.patterns import Block, Pattern

STEPS = 60  # for each lambda
COARSE = (0.1, 0.03, 0.01, 0.003, 0.001)  # lambda, times the median of |W_0 G|
FINE = (1.7, 0.6)  # times the best of those


class Fista(Method):
    """Serves what zeroes single weights: all but strips and blocks.

    Source: Zhao et al. 2024, FISTAPruner (arXiv 2408.03728); ours takes the pruned blocks' output as both input and
    target, and weighs the penalty by the inputs.
    """

    name = "fista"
    needs = ("gram",)

    def serves(self, pattern: Pattern) -> bool:
        return pattern.rows == 1 and (not isinstance(pattern, Block) or pattern.width == 1)

    def run(self, problem: Problem) -> Solution:
        unit, scale = unit_gram(problem.stats["gram"])
        weight = problem.weight * scale
        pull = weight @ unit
        step = 1 / _largest(unit)
        middle = float(pull.abs().median())
        best, least, chosen, moved = weight, torch.inf, 0.0, weight
        for factors in (COARSE, FINE):
            around = chosen or middle
            for factor in factors:
                moved = _shrink(moved, pull, unit, around * factor, step)
                free = moved - step * (moved @ unit - pull)  # a step without penalty: what shrank to zero has an order
                change = weight - free.masked_fill(~problem.pattern.select(free.square(), problem.sparsity), 0.0)
                loss = float((change @ unit * change).sum(dtype=torch.float64))
                if loss < least:
                    best, least, chosen = free, loss, around * factor
        keep = problem.pattern.select(best.square(), problem.sparsity)
        return Solution(keep, best.masked_fill(~keep, 0.0) / scale)


def _shrink(start: Tensor, pull: Tensor, unit: Tensor, lam: float, step: float) -> Tensor:
    """Return the weights after STEPS accelerated steps; all [out, in] but `unit` [in, in]."""
    now, ahead, momentum = start, start, 1.0
    for _ in range(STEPS):
        before = now
        now = torch.nn.functional.softshrink(ahead - step * (ahead @ unit - pull), lam * step)
        following = (1 + (1 + 4 * momentum * momentum) ** 0.5) / 2
        ahead = now + (momentum - 1) / following * (now - before)
        momentum = following
    return now


def _largest(matrix: Tensor) -> float:
    """An upper bound of the largest eigenvalue that is seldom far off: power iteration, and 2 % on top."""
    vector = torch.ones(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for _ in range(30):
        vector = matrix @ (vector / vector.norm())
    return max(1.0, 1.02 * float(vector.norm()))

"""ADMM: the weights and their support found together, by splitting "near in output" from "sparse".

In units where G has a unit diagonal, with G' = G + 0.1 I, rho = 1 and R = (G' + rho I)^-1, repeat

    Z = (W + U) on the support,   U <- U + W - Z,   W <- (W_0 G' + rho (Z - U)) R.

For the first steps the support is chosen anew each time, by the size of W + U; where the pattern is free, the sparsity
climbs to its end by a cubic. After that it stands, and the rest of the steps settle the weights on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeroskip.prune.base import Method, Problem, Solution
from zeroskip.prune.numerics import inverse, unit_gram

RIDGE = 0.1
STEPS = 20
CHOOSING = 15  # of the steps


class Admm(Method):
    """Serves every pattern; the scores of strips and blocks are sums of squares.

    Source: Boža 2024 (arXiv 2401.02938); ours ramps unstructured sparsity only, where there is something to ramp.
    """

    name = "admm"
    needs = ("gram",)

    def run(self, problem: Problem) -> Solution:
        unit, scale = unit_gram(problem.stats["gram"])
        keep, weight, notes = split(problem.weight * scale, unit, problem, STEPS)
        return Solution(keep, weight / scale, notes)


def split(weight: Tensor, unit: Tensor, problem: Problem, steps: int) -> tuple[Tensor, Tensor, list[str]]:
    """Run the iteration.

    Parameters
    ----------
    weight, unit : Tensor
        [out, in] and [in, in], in units where G has a unit diagonal; not modified.
    problem : Problem
        Its pattern and sparsity are used.
    steps : int
        In all; the support stands after three quarters of them.

    Returns
    -------
    Tensor, Tensor, list of str
        [out, in] bool support; [out, in] the weights on it; remarks.
    """
    pattern, choosing = problem.pattern, steps * CHOOSING // STEPS
    solve, notes = inverse(unit, RIDGE + 1, problem.name)
    pull = torch.addmm(weight, weight, unit, beta=RIDGE)
    moved, dual = weight, torch.zeros_like(weight)
    keep = torch.ones_like(weight, dtype=torch.bool)
    for step in range(steps):
        total = moved + dual
        if step < choosing:
            ramp = 1.0 if pattern.sparsity is not None else 1 - (1 - (step + 1) / choosing) ** 3
            keep = pattern.select(total.square(), problem.sparsity * ramp, "tensor")
        kept = total.masked_fill(~keep, 0.0)
        dual = total - kept
        moved = (pull + kept - dual) @ solve
    return keep, (moved + dual).masked_fill(~keep, 0.0), notes

"""Coordinate descent on codes: visit all columns again, each weight becomes the best integer while the others stand.

A sweep (`gptq`) meets every column once, and what the last ones lose nobody makes up for; it also treats zeros as
weights that were rounded badly, while each row has its own. Here, with R = W - Q the error, G' = G + lambda diag G
and P = R G', the best value of a kept weight while the others stand is

    Q_ij + P_ij / G'_jj,    rounded to a code; then P_i <- P_i - (change) G'_j.

Each step lowers tr(R G' R^T) or leaves it, and no zero moves. Scales stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeroskip.prune.base import Integers, Problem, Solution, Solver
from zeroskip.prune.scales import spread
from zeroskip.prune.sparsegpt import RIDGE, WIDTH
from zeroskip.quantize import LEAST, LIMIT

PASSES = 4  # at most; the first two gain nearly all


class CoordinateDescent(Solver):
    """Source: Behdin et al. 2023 (QuantEase, arXiv 2309.01885); ours works under zeros and with given scales."""

    name = "cd"
    needs = ("gram",)
    rounds = True

    def refine(self, problem: Problem, solution: Solution) -> Solution:
        if solution.scales is None:
            return solution
        integers = problem.integers or Integers("int4", 64)
        step = spread(solution.scales, integers, problem.weight.shape[1])
        weight = descend(problem.weight, solution.weight, step, solution.keep, problem.stats["gram"], integers.values)
        return Solution(solution.keep, weight, solution.notes, solution.scales)


def descend(dense: Tensor, rounded: Tensor, step: Tensor, keep: Tensor, gram: Tensor, values: str) -> Tensor:
    """Return better codes times `step`.

    Parameters
    ----------
    dense, rounded : Tensor
        [out, in] fp32: the weight that is meant, and codes times `step` to begin with; not modified.
    step : Tensor
        [out, in] fp32, the scale of every weight.
    keep : Tensor
        [out, in] bool.
    gram : Tensor
        [in, in] X^T X.
    values : str
        "int8" or "int4".

    Returns
    -------
    Tensor
        [out, in] fp32, zero off `keep`.
    """
    low, high = LEAST[values], LIMIT[values]
    metric = gram.clone()
    metric.diagonal().mul_(1 + RIDGE)
    energy = metric.diagonal()
    work, steps, kept = (each.t().contiguous() for each in (rounded, step, keep))  # a column is one contiguous row
    pull = metric @ (dense - rounded).t()  # [in, out]: P transposed
    for _ in range(PASSES):
        changes = 0
        for start in range(0, len(work), WIDTH):
            part = slice(start, min(start + WIDTH, len(work)))
            moved = torch.zeros_like(work[part])
            inside = metric[part, part]
            for j in range(part.start, part.stop):
                if energy[j] <= 0:  # a dead input: any value is as good
                    continue
                best = work[j] + pull[j] / energy[j]
                best = (best / steps[j]).round_().clamp_(low, high).mul_(steps[j])
                moved[j - start] = torch.where(kept[j], best, 0.0) - work[j]
                work[j] += moved[j - start]
                pull[part].addr_(inside[j - start], moved[j - start], alpha=-1)
            outside = metric[:, part].clone()
            outside[part] = 0.0  # done above
            pull.addmm_(outside, moved, alpha=-1)
            changes += int(torch.count_nonzero(moved))
        if changes == 0:
            break
    return work.t().contiguous()

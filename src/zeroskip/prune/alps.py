"""ALPS: ADMM whose penalty grows until the support settles, then a solve on that support.

The problem is ADMM's ("admm"), with ridge 0.01. G is decomposed once, G = Q diag(L) Q^T, so that the inverse of
G + rho I costs no factorisation and rho may change: every three steps it grows by 1.3, 1.2 or 1.1, the more the
support still changes. A support that never changes at all began too stiff: rho / 5, and again from the start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeroskip.prune.base import Method, Problem, Solution
from zeroskip.prune.ls import by_rows, by_strips
from zeroskip.prune.numerics import precision, unit_gram

RIDGE = 0.01
RHO = 0.1
STEPS = 300
RESTARTS = 5
CHECK = 3  # steps between two looks at the support


class Alps(Method):
    """Serves every pattern.

    Source: Meng et al. 2024 (arXiv 2406.07831), algorithms 1 and 2; ours ends with the solve of "+ls" instead of ten
    steps of conjugate gradients.
    """

    name = "alps"
    needs = ("gram",)

    def run(self, problem: Problem) -> Solution:
        unit, scale = unit_gram(problem.stats["gram"])
        weight = problem.weight * scale
        values, basis = torch.linalg.eigh(unit.to(precision(len(unit))))
        values, basis = values.clamp_min(0).float() + RIDGE, basis.float()
        rho = RHO
        for _ in range(RESTARTS):
            kept, keep, moved = _settle(weight, values, basis, rho, problem)
            if moved:
                break
            rho /= 5
        solve = by_strips if problem.pattern.rows > 1 else by_rows
        change, notes = solve(unit, weight - kept, keep, RIDGE, problem.pattern.rows, problem.name)
        return Solution(keep, (kept + change) / scale, notes)


def _settle(weight: Tensor, values: Tensor, basis: Tensor, rho: float, problem: Problem) -> tuple[Tensor, Tensor, bool]:
    """Iterate until the support stands.

    Parameters
    ----------
    weight : Tensor
        [out, in], in units where G has a unit diagonal.
    values, basis : Tensor
        [in] eigenvalues of G + ridge I and [in, in] its eigenvectors.

    Returns
    -------
    Tensor, Tensor, bool
        [out, in] the weights on the support, [out, in] bool the support, and whether it ever changed.
    """
    pull = (weight @ basis * values) @ basis.t()
    keep = problem.pattern.select(weight.square(), problem.sparsity)
    kept, price = weight.masked_fill(~keep, 0.0), torch.zeros_like(weight)
    before, moved = keep, False
    for step in range(1, STEPS + 1):
        free = ((pull - price + rho * kept) @ basis / (values + rho)) @ basis.t()
        total = free + price / rho
        keep = problem.pattern.select(total.square(), problem.sparsity)
        kept = total.masked_fill(~keep, 0.0)
        price = rho * (total - kept)
        if step % CHECK == 0:
            changed = int((keep != before).sum()) / keep.numel()
            if changed == 0:
                break
            moved, before = True, keep
            rho *= 1.3 if changed >= 0.1 else 1.2 if changed >= 0.005 else 1.1
    return kept, keep, moved

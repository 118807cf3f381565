"""Ridge least squares: refit the kept weights so that the layer's output stays as near as it can.

With S the support of a row and C its complement,

    W_S <- W_S + (G_SS + lambda D)^-1 G_SC W_C,    G = X^T X,  D = diag(G),  lambda = 0.01.

Dividing input j by sqrt(G_jj) makes D the identity, which is also the Jacobi preconditioner. Rows that share their
support (strips, blocks) share one Cholesky factor in fp64. Where every row has its own support, all rows run
conjugate gradients together in fp32, each step one product with G.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from zeroskip.prune.base import Problem, Solution, Solver
from zeroskip.prune.numerics import cholesky, precision, unit_gram
from zeroskip.prune.scales import refit_scales

log = logging.getLogger(__name__)

RIDGE = 0.01
TOLERANCE = 3e-4  # |residual| / |right-hand side| of every row; output errors within 1 % of a direct solve, mostly .1 %
STEPS = 1000


class LeastSquares(Solver):
    """Source: pruning as support-restricted regression; Boža 2024 (arXiv 2401.02938) solves the same by ADMM."""

    name = "ls"
    needs = ("gram",)

    def refine(self, problem: Problem, solution: Solution) -> Solution:
        if solution.scales is not None:
            return refit_scales(problem, solution)
        unit, scale = unit_gram(problem.stats["gram"])  # a dead input: its row of G is zero, so its weights stay
        lost = (problem.weight - solution.weight) * scale
        solve = by_strips if problem.pattern.rows > 1 else by_rows
        change, notes = solve(unit, lost, solution.keep, RIDGE, problem.pattern.rows, problem.name)
        return Solution(solution.keep, solution.weight + change / scale, solution.notes + notes)


def by_strips(
    unit: Tensor, lost: Tensor, keep: Tensor, ridge: float, rows: int, name: str = ""
) -> tuple[Tensor, list[str]]:
    """Solve strip by strip; the rows of a strip share their support.

    Parameters
    ----------
    unit : Tensor
        [in, in] G scaled to a unit diagonal.
    lost : Tensor
        [out, in] the removed weights times the scale, zero where kept.
    keep : Tensor
        [out, in] bool.
    ridge : float
    rows : int
        Height of a strip.
    name : str
        For the log.

    Returns
    -------
    Tensor, list of str
        [out, in] the change of the scaled weights, zero off the support; remarks.
    """
    change = torch.zeros_like(lost)
    notes: list[str] = []
    pull = lost @ unit
    for top in range(0, len(lost), rows):
        on = keep[top].nonzero().squeeze(1)
        matrix = unit[on][:, on].to(precision(len(on)))
        factor, raised = cholesky(matrix, ridge, f"{name} rows {top}..{min(top + rows, len(lost)) - 1}")
        notes += raised
        right = pull[top : top + rows, on].to(matrix.dtype).t()
        change[top : top + rows, on] = torch.cholesky_solve(right, factor).t().to(change.dtype)
    return change, notes


def by_rows(
    unit: Tensor, lost: Tensor, keep: Tensor, ridge: float, rows: int = 1, name: str = ""
) -> tuple[Tensor, list[str]]:
    """As `by_strips` where every row has its own support: conjugate gradients on all rows at once."""
    mask = keep.to(lost.dtype)
    residual = (lost @ unit) * mask
    goal = TOLERANCE**2 * residual.square().sum(1)
    change, direction = torch.zeros_like(lost), residual.clone()
    size = residual.square().sum(1)
    for _ in range(STEPS):
        running = size > goal
        if not bool(running.any()):
            return change, []
        image = torch.addmm(direction, direction, unit, beta=ridge).mul_(mask)
        curve = (direction * image).sum(1)
        step = torch.where(running & (curve > 0), size / curve, 0.0).unsqueeze(1)
        change.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        before, size = size, torch.where(running, residual.square().sum(1), size)
        grown = torch.where(running, size / before, 0.0).unsqueeze(1)
        direction.mul_(grown).add_(residual)
    worst = float((size / goal.clamp_min(1e-38)).max().sqrt() * TOLERANCE)
    note = f"conjugate gradients stopped after {STEPS} steps with a residual of {worst:.1g}"
    log.warning("%s: %s", name, note)
    return change, [note]

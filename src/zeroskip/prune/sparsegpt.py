"""SparseGPT: one sweep over the input columns; what a column loses, the columns after it make up for.

With H = G + lambda diag(G) and U^T U = H^-1, U upper, the weights of column j that go (or are rounded) leave

    e = (w_j - q_j) / U_jj,    W_:,l <- W_:,l - e U_jl  for l > j,

and cost e^2, the exact rise of the loss tr(dW H dW^T) after the best answer of the columns after j. Zeros are chosen
by w^2 / U_jj^2 on the weights as the sweep has left them: in groups of M where the pattern is N:M (or N:M@V, the
scores of a strip summed), in blocks of 128 columns otherwise. What a split leaves dense is chosen before the sweep.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zeroskip.prune.base import Method, Problem, Solution
from zeroskip.prune.numerics import in_range, inverse_factor, unit_gram
from zeroskip.prune.patterns import Block, Pattern, Split

RIDGE = 0.01
WIDTH = 128  # columns whose updates are gathered into one matrix product

Rounding = Callable[[int, Tensor], Tensor]


class SparseGPT(Method):
    """Serves every pattern but unstructured zeros that compete beyond a block of columns.

    Source: Frantar and Alistarh 2023 (arXiv 2301.00774); ours puts the ridge on diag(G) instead of its mean, counts
    exactly, and lets strips and blocks choose by their summed scores.
    """

    name = "sparsegpt"
    needs = ("gram",)

    def serves(self, pattern: Pattern) -> bool:
        return in_one_sweep(pattern)

    def run(self, problem: Problem) -> Solution:
        unit, scale = unit_gram(problem.stats["gram"])
        upper, notes = inverse_factor(unit, RIDGE, problem.name)
        keep, weight, loss = sweep(problem.weight * scale, upper, problem.pattern, problem.sparsity)
        in_range(loss, problem.stats["gram"], problem.name)
        return Solution(keep, weight / scale, notes)


def sweep(
    weight: Tensor, upper: Tensor, pattern: Pattern | Tensor, sparsity: float, rounding: Rounding | None = None
) -> tuple[Tensor, Tensor, float]:
    """Choose, round and make up for it, from the first column to the last.

    Parameters
    ----------
    weight : Tensor
        [out, in] fp32 in the units of `upper`; not modified.
    upper : Tensor
        [in, in] U with U^T U = H^-1.
    pattern : Pattern or Tensor
        What to choose, or the support itself, [out, in] bool.
    sparsity : float
    rounding : callable, optional
        (column index, [out] values of that column) -> the nearest values that can be stored.

    Returns
    -------
    Tensor, Tensor, float
        [out, in] bool support; [out, in] fp32 weights, zero off the support; the loss sum e^2 = tr(dW H dW^T).
    """
    rows, k = weight.shape
    work = weight.t().contiguous()  # a column is one contiguous row
    keep = torch.ones_like(work, dtype=torch.bool) if isinstance(pattern, Pattern) else pattern.t().contiguous()
    asked = pattern.together if isinstance(pattern, Pattern) else None
    unit = asked or (pattern.width if isinstance(pattern, Block) else 1)
    width = max(1, WIDTH // unit) * unit
    together = asked or width  # columns whose zeros are chosen at once
    pivots = upper.diagonal().unsqueeze(1)
    dense = None
    if isinstance(pattern, Split):
        dense, pattern = pattern.dense((work / pivots).square_().t()).t(), pattern.rest
    loss = 0.0
    for start in range(0, k, width):
        stop = min(start + width, k)
        errors = work.new_empty(stop - start, rows)
        for j in range(start, stop):
            if isinstance(pattern, Pattern) and (j - start) % together == 0:
                part = slice(j, min(j + together, stop))
                score = (work[part] / pivots[part]).square_().t()
                keep[part] = pattern.select(score, _share(pattern, sparsity, weight.shape, part.start, part.stop)).t()
                if dense is not None:
                    keep[part] |= dense[part]
            new = work[j] if rounding is None else rounding(j, work[j])
            new = torch.where(keep[j], new, 0.0)
            error = (work[j] - new) / upper[j, j]
            errors[j - start] = error
            work[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
            work[j] = new
        work[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
        loss += float(errors.double().square().sum())
    return keep.t(), work.t(), loss


def in_one_sweep(pattern: Pattern) -> bool:
    """Whether a sweep over the columns can choose: not where scores compete over columns far apart."""
    return pattern.scope in (None, "columns")


def _share(pattern: Pattern, sparsity: float, shape: torch.Size, start: int, stop: int) -> float:
    """The fraction of zeros for some of the columns, such that all parts together drop as many units as were asked."""
    if not isinstance(pattern, Block):
        return sparsity
    across = shape[1] // pattern.width
    down = shape[0] // pattern.height
    drop = round(down * across * sparsity)
    first, last = (round(drop * (column // pattern.width) / across) for column in (start, stop))
    return (last - first) / (down * (stop - start) // pattern.width)

"""Scales of weights that are integers times the scale of their group: the choice before rounding, the refit after.

The refit is what "+ls" does to such weights. The codes stay. With A_g the codes of group g of a row, the row is
sum_g s_g A_g, and the scales that bring its output nearest to the dense one are s + d, (N + lambda diag N) d = b - N s
with N_gh = A_g G A_h^T and b_g = A_g G w^T: one small system for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from zeroskip.prune.base import Integers, Problem, Solution
from zeroskip.quantize import absmax_scales, codes_of, fits_fp16

__all__ = ["group_scales", "refit_scales", "spread"]

RIDGE = 0.01
CACHED = 1 << 17  # weights whose rows are tried together: larger intermediates are pages that the system clears anew
CLIPS = tuple(1 - 0.05 * step for step in range(9))  # fractions of the largest weight that is still exact


def group_scales(weight: Tensor, energy: Tensor, integers: Integers) -> Tensor:
    """Choose the scale of every group of a row.

    Parameters
    ----------
    weight : Tensor
        [out, in] fp32; not modified.
    energy : Tensor
        [in] what a squared error of each input counts.
    integers : Integers

    Returns
    -------
    Tensor
        [out, ceil(in / group_size)] fp16; fp32 where the weights are too large or too small for it.
    """
    parts = torch.split(weight, max(1, CACHED // max(1, weight.shape[1])))
    dtype = torch.float16 if fits_fp16(weight, integers.values) else torch.float32
    return torch.cat([_best_scales(part, energy, integers, dtype) for part in parts])


def _best_scales(weight: Tensor, energy: Tensor, integers: Integers, dtype: torch.dtype) -> Tensor:
    full = absmax_scales(weight, integers.values, integers.group_size, dtype)
    best, least = full, torch.full_like(full, torch.inf, dtype=torch.float32)
    for clip in CLIPS:
        scales = (full.float() * clip).to(dtype)
        scales = torch.where(scales > 0, scales, full)
        codes = codes_of(weight, scales, integers.values, integers.group_size)
        gap = (codes * spread(scales, integers, weight.shape[1]) - weight).square() * energy
        filled = torch.nn.functional.pad(gap, (0, -gap.shape[1] % integers.group_size))
        cost = filled.view(len(gap), -1, integers.group_size).sum(2)
        best, least = torch.where(cost < least, scales, best), torch.minimum(cost, least)
    return best


def spread(scales: Tensor, integers: Integers, k: int) -> Tensor:
    """Return [out, in] fp32, the scale of every weight."""
    return scales.float().repeat_interleave(integers.group_size, 1)[:, :k]


def refit_scales(problem: Problem, solution: Solution) -> Solution:
    """Return the solution with better scales; a row keeps its own where rounding them leaves no gain."""
    integers, scales = problem.integers or Integers("int4", 64), solution.scales
    if scales is None:
        return solution
    size, k = integers.group_size, problem.weight.shape[1]
    gram = problem.stats["gram"]
    codes = codes_of(solution.weight, scales, integers.values, size).float()
    count = scales.shape[1]
    normal = gram.new_zeros(len(codes), count, count)
    for group in range(count):
        part = slice(group * size, min((group + 1) * size, k))
        normal[:, :, group] = _sums((codes[:, part] @ gram[part]) * codes, size)
    lost = problem.weight - solution.weight
    right = _sums((lost @ gram) * codes, size)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    normal.diagonal(dim1=1, dim2=2).add_(torch.where(diagonal > 0, RIDGE * diagonal, 1.0))
    change = torch.linalg.solve(normal.double(), right.double().unsqueeze(2)).squeeze(2)
    better = (scales.double() + change).to(scales.dtype)
    better = torch.where(torch.isfinite(better) & (better > 0), better, scales)
    weight = codes * spread(better, integers, k)
    gain = _error(problem.weight - weight, gram) < _error(lost, gram)
    return Solution(
        solution.keep,
        torch.where(gain.unsqueeze(1), weight, solution.weight),
        solution.notes,
        torch.where(gain.unsqueeze(1), better, scales),
    )


def _sums(values: Tensor, size: int) -> Tensor:
    """[rows, in] -> [rows, groups]"""
    return pad(values, (0, -values.shape[1] % size)).view(len(values), -1, size).sum(2)


def _error(change: Tensor, gram: Tensor) -> Tensor:
    """[rows] the output error of each."""
    return (change @ gram * change).sum(1, dtype=torch.float64)

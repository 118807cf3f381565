"""GPTQ: round the weights to integers column by column, the columns after making up for it; zeros stay zeros.

It is SparseGPT's sweep with the support given: each kept weight becomes the nearest `code * scale` instead of staying,
and the error goes on to the kept weights after it. The scale of a row's group of inputs comes from the weights as they
are meant: the largest of them over the largest code, or the fraction of it that rounds with the least error, each
input weighed by its energy G_jj.

"sparsegpt+gptq" chooses zeros and rounds in the one sweep, each seeing the errors of the other. "admm+gptq" and
"alps+gptq" find the zeros and the weights that make up for them first, all columns together, and round those.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from zeroskip.prune.admm import Admm
from zeroskip.prune.alps import Alps
from zeroskip.prune.base import Integers, Method, Problem, Solution
from zeroskip.prune.numerics import in_range, inverse_factor, unit_gram
from zeroskip.prune.patterns import Pattern
from zeroskip.prune.scales import group_scales, spread
from zeroskip.prune.sparsegpt import RIDGE, Rounding, in_one_sweep, sweep
from zeroskip.quantize import LEAST, LIMIT, codes_of


class Gptq(Method):
    """Quantises what is there, under the zeros that are there.

    Source: Frantar et al. 2023 (arXiv 2210.17323); ours is symmetric, with scales chosen by weighted rounding error.
    """

    name = "gptq"
    needs = ("gram",)
    chooses = False
    quantizes = True

    def serves(self, pattern: Pattern) -> bool:
        return pattern.name == "unstructured"

    def run(self, problem: Problem) -> Solution:
        return _rounded(problem, problem.weight != 0)


class SparseGPTQ(Method):
    """Serves what "sparsegpt" does.

    Source: Frantar and Alistarh 2023 (arXiv 2301.00774), section 3.5; ours takes the scales from a first sweep that
    does not round: weights that make up for zeros can grow far beyond the dense ones, whose scales would cut them off.
    """

    name = "sparsegpt+gptq"
    needs = ("gram",)
    quantizes = True

    def serves(self, pattern: Pattern) -> bool:
        return in_one_sweep(pattern)

    def run(self, problem: Problem) -> Solution:
        return _rounded(problem, problem.pattern)


class PrunedFirst(Method):
    """A method that finds the zeros and the weights that make up for them, all columns together; those are rounded.

    The sweep starts from weights of which no move of a kept one helps to first order, so that all it has to make up
    for is rounding. A subclass names the method.
    """

    sparse: ClassVar[type[Method]]
    needs = ("gram",)
    quantizes = True

    def run(self, problem: Problem) -> Solution:
        sparse = self.sparse().run(problem)
        found = _rounded(replace(problem, weight=sparse.weight), sparse.keep)
        return Solution(found.keep, found.weight, sparse.notes + found.notes, found.scales)


class AdmmGPTQ(PrunedFirst):
    """Serves every pattern. Source: `admm` and `gptq`, one behind the other."""

    name = "admm+gptq"
    sparse = Admm


class AlpsGPTQ(PrunedFirst):
    """Serves every pattern. Source: `alps` and `gptq`, one behind the other."""

    name = "alps+gptq"
    sparse = Alps


def _rounded(problem: Problem, support: Pattern | Tensor) -> Solution:
    integers = problem.integers or Integers("int4", 64)
    gram = problem.stats["gram"]
    unit, scale = unit_gram(gram)
    upper, notes = inverse_factor(unit, RIDGE, problem.name)
    weight = problem.weight * scale
    meant = (
        problem.weight if isinstance(support, Tensor) else sweep(weight, upper, support, problem.sparsity)[1] / scale
    )
    in_range(meant, gram, problem.name)
    scales = group_scales(meant, gram.diagonal(), integers)
    keep, weight, loss = sweep(weight, upper, support, problem.sparsity, rounding(scales, scale, integers))
    in_range(loss, gram, problem.name)  # codes would hide it
    codes = codes_of(weight / scale, scales, integers.values, integers.group_size)
    return Solution(keep, codes * spread(scales, integers, len(scale)), notes, scales)


def rounding(scales: Tensor, unit: Tensor, integers: Integers) -> Rounding:
    """Return the function that rounds a column in units where G has a unit diagonal; `unit` [in] leads there."""
    low, high = LEAST[integers.values], LIMIT[integers.values]
    wide = scales.float().t().contiguous()

    def nearest(j: int, column: Tensor) -> Tensor:
        step = wide[j // integers.group_size] * unit[j]
        return (column / step).round_().clamp_(low, high).mul_(step)

    return nearest

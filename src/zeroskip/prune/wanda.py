"""Wanda: a weight counts by what it adds to the output, |W_ij| times the norm of input j, compared within each row."""

from __future__ import annotations

from torch import Tensor

from zeroskip.prune.base import Method, Problem


class Wanda(Method):
    """score = W_ij^2 * sum over tokens of x_j^2.

    The square of the paper's score orders the weights of a row alike; it is the output error that the missing weight
    alone would cause, so sums over strips and blocks mean something.

    Source: Sun et al. 2023 (arXiv 2306.11695), section 3; ours keeps exact counts.
    """

    name = "wanda"
    needs = ("sumsq",)
    scope = "row"

    def score(self, problem: Problem) -> Tensor:
        return problem.weight.square() * problem.stats["sumsq"]

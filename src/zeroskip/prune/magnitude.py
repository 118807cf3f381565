"""Magnitude pruning: score |W|, compared over the whole matrix."""

from __future__ import annotations

from torch import Tensor

from zeroskip.prune.base import Method, Problem


class Magnitude(Method):
    """Needs no data. Source: Han et al. 2015, "Learning both weights and connections"; here one shot."""

    name = "magnitude"

    def score(self, problem: Problem) -> Tensor:
        return problem.weight.abs()

"""Random pruning: the floor that every other method must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from zeroskip.prune.base import Method, Problem


class Random(Method):
    """Scores drawn from the site's own generator, so the choice depends on seed and site name only."""

    name = "random"

    def score(self, problem: Problem) -> Tensor:
        return torch.rand(problem.weight.shape, generator=problem.generator, device=problem.weight.device)

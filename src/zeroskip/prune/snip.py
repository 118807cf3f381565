"""SNIP: score |g * w|, how much the loss changes, to first order, when the weight goes."""

from __future__ import annotations

import torch
from torch import Tensor

from zeroskip.prune.base import Method, Problem, Survey
from zeroskip.prune.gradients import as_matrices, differentiable, loss_of, parameters_of


class Snip(Method):
    """Takes `loss=`; the gradient is the mean over the calibration batches, of the dense model.

    Source: Lee et al. 2019 (arXiv 1810.02340); ours compares within each matrix.
    """

    name = "snip"
    surveys = batched = True

    def survey(self, survey: Survey) -> dict[str, dict[str, Tensor]]:
        parameters = parameters_of(survey.sites)
        total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        with differentiable(survey.model, parameters):
            for batch in survey.batches:
                found = torch.autograd.grad(loss_of(survey, batch), parameters, allow_unused=True)
                for mean, gradient in zip(total, found, strict=True):
                    if gradient is not None:
                        mean.add_(gradient.float(), alpha=1 / len(survey.batches))
        matrices = as_matrices(survey.sites, parameters, total)
        return {name: {"gradient": matrix} for name, matrix in matrices.items()}

    def score(self, problem: Problem) -> Tensor:
        return (problem.stats["gradient"] * problem.weight).abs()

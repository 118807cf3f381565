"""GraSP: keep the weights without which the gradient would lose most of its norm, score w * (H g).

Removing weight w changes |g|^2 by -2 w (H g), to first order; H is the Hessian of the loss, g its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeroskip.prune.base import Method, Problem, Survey
from zeroskip.prune.gradients import as_matrices, differentiable, loss_of, parameters_of

TEMPERATURE = 200.0


class Grasp(Method):
    """Takes `loss=`; without it the default loss at temperature 200 (divide the logits in yours to have the same).

    Source: Wang et al. 2020 (arXiv 2002.07376), equation 8; ours compares within each matrix.
    """

    name = "grasp"
    surveys = batched = True

    def survey(self, survey: Survey) -> dict[str, dict[str, Tensor]]:
        parameters = parameters_of(survey.sites)
        share = 1 / len(survey.batches)
        mean = [torch.zeros_like(parameter) for parameter in parameters]
        product = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        with differentiable(survey.model, parameters):
            for batch in survey.batches:
                found = torch.autograd.grad(loss_of(survey, batch, TEMPERATURE), parameters, allow_unused=True)
                for total, gradient in zip(mean, found, strict=True):
                    if gradient is not None:
                        total.add_(gradient, alpha=share)
            for batch in survey.batches:
                loss = loss_of(survey, batch, TEMPERATURE)
                found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
                pairs = [(g, total) for g, total in zip(found, mean, strict=True) if g is not None]
                along = torch.stack([(g * total).sum() for g, total in pairs]).sum()
                second = torch.autograd.grad(along, parameters, allow_unused=True) if along.requires_grad else ()
                for total, gradient in zip(product, second, strict=False):
                    if gradient is not None:
                        total.add_(gradient.float(), alpha=share)
        matrices = as_matrices(survey.sites, parameters, product)
        return {name: {"curvature": matrix} for name, matrix in matrices.items()}

    def score(self, problem: Problem) -> Tensor:
        return problem.stats["curvature"] * problem.weight

"""SynFlow: without data, keep the weights through which most paths flow, in a hundred rounds so that no layer dries up.

All weights are replaced by their absolute values, all inputs (what embeddings return included) by ones, and
R = the sum of the outputs. The score is |w * dR/dw|; the sparsity climbs exponentially, each round scoring what the
last one left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zeroskip.errors import ZeroskipError
from zeroskip.prune.base import Method, Problem, Survey
from zeroskip.prune.gradients import as_matrices, differentiable, parameters_of

ROUNDS = 100
TOKENS = 8


class SynFlow(Method):
    """Needs no data; a calibration batch, where one is given, tells the shape of the input only.

    The model runs in fp64 in eval mode, so that the product of many layers neither overflows nor vanishes. N:M patterns
    choose in one round.

    Source: Tanaka et al. 2020 (arXiv 2006.05467), algorithm 1; ours compares within each matrix.
    """

    name = "synflow"
    surveys = True

    def survey(self, survey: Survey) -> dict[str, dict[str, Tensor]]:
        climbing = [site for site in survey.sites if survey.patterns[site.name].sparsity is None]
        rounds = ROUNDS if any(survey.sparsity[site.name] for site in climbing) else 1
        arguments = _ones(survey)
        parameters = parameters_of(survey.sites)
        with _absolute(survey.model), differentiable(survey.model, parameters):
            scores = _scores(survey, parameters, arguments)
            for step in range(1, rounds):
                with torch.no_grad():
                    for site in climbing:
                        pattern = survey.patterns[site.name]
                        reached = 1 - (1 - survey.sparsity[site.name]) ** (step / rounds)
                        keep = torch.stack([pattern.select(score, reached) for score in scores[site.name]])
                        site.write(site.weight() * keep)
                scores = _scores(survey, parameters, arguments)
        return {name: {"flow": score} for name, score in scores.items()}

    def score(self, problem: Problem) -> Tensor:
        return problem.stats["flow"]


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _scores(survey: Survey, parameters: Sequence[nn.Parameter], arguments: Arguments) -> dict[str, Tensor]:
    """{site: |w * dR/dw|} for the weights as they are."""
    found = torch.autograd.grad(_flow(survey, arguments), parameters, allow_unused=True)
    flows = [
        torch.zeros_like(p) if g is None else (g * p).detach().abs() for g, p in zip(found, parameters, strict=True)
    ]
    return as_matrices(survey.sites, parameters, flows)


def _flow(survey: Survey, arguments: Arguments) -> Tensor:
    """The sum of what the model gives for ones."""
    handles = [
        module.register_forward_hook(lambda _, __, output: torch.ones_like(output))
        for module in survey.model.modules()
        if isinstance(module, nn.Embedding)
    ]
    try:
        output = survey.model(*arguments[0], **arguments[1])
    except (TypeError, RuntimeError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ZeroskipError(f"synflow cannot run the model on ones ({first}): give one calibration batch") from error
    finally:
        for handle in handles:
            handle.remove()
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "items") else output)
    values = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not values or not bool(torch.isfinite(values[0]).all()):
        raise ZeroskipError("synflow: the model gives no finite output for ones and absolute weights")
    return values[0].sum()


def _ones(survey: Survey) -> Arguments:
    """Arguments of the right shape: of the first batch; or tokens for an embedding; or the inputs of the first site."""

    def one(value: Any) -> Any:
        return (
            torch.ones_like(value, dtype=torch.float64)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
        )

    if survey.batches:
        batch = survey.batches[0]
        return tuple(one(value) for value in batch.args), {k: one(v) for k, v in batch.kwargs.items()} | batch.extra
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    if any(isinstance(module, nn.Embedding) for module in survey.model.modules()):
        decoder = getattr(getattr(survey.model, "config", None), "is_encoder_decoder", False)
        return (), {"input_ids": ids} | ({"decoder_input_ids": ids} if decoder else {})
    return (torch.ones(1, survey.sites[0].shape[-1], dtype=torch.float64),), {}


@contextmanager
def _absolute(model: nn.Module) -> Iterator[None]:
    """Put fp64 absolute values in the place of all floating-point parameters and buffers, and the old ones back."""
    old = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    parameters = {id(parameter) for parameter in model.parameters()}
    default = torch.get_default_dtype()
    try:
        for tensor, data in old:
            tensor.data = data.double().abs() if id(tensor) in parameters else data.double()
        torch.set_default_dtype(torch.float64)  # for the tensors that models make on the way
        yield
    finally:
        torch.set_default_dtype(default)
        for tensor, data in old:
            tensor.data = data

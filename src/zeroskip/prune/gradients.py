"""Derivatives of a loss by the weights of the sites, for methods that score by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zeroskip.calibrate import Batch
from zeroskip.errors import ZeroskipError
from zeroskip.model import Site
from zeroskip.prune.base import Survey

__all__ = ["as_matrices", "differentiable", "loss_of", "parameters_of"]


def parameters_of(sites: Sequence[Site]) -> list[nn.Parameter]:
    """Return the weights of the sites and the other parameters of their modules, each once, biases among them."""
    every = (
        p for site in sites for p in (site.tensor, *site.module.parameters(recurse=False)) if p.is_floating_point()
    )
    return list({id(parameter): parameter for parameter in every}.values())


@contextmanager
def differentiable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let gradients flow to these parameters only; attention takes the one path that can be derived twice."""
    if torch.is_inference_mode_enabled():
        raise ZeroskipError("the method needs gradients: call prune outside torch.inference_mode()")
    old = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in old:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for parameter, wanted in old.items():
            parameter.requires_grad_(wanted)


def as_matrices(
    sites: Sequence[Site], parameters: Sequence[nn.Parameter], values: Sequence[Tensor]
) -> dict[str, Tensor]:
    """See tensors shaped like the parameters as the sites see those: {site: [groups, out, in] fp32 or fp64}.

    Each value stands in its parameter's place while the site is asked for its weight.
    """
    swapped = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        return {site.name: site.weight().clone() for site in sites}
    finally:
        for parameter, data in zip(parameters, swapped, strict=True):
            parameter.data = data


def loss_of(survey: Survey, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Run the model on a batch and return its loss.

    Parameters
    ----------
    survey : Survey
        Its `loss` if it has one. Otherwise the cross-entropy of the next token, for models that return logits
        [batch, seq, vocabulary] for `input_ids` [batch, seq]; targets whose attention mask is 0 do not count.
    temperature : float
        Divides the logits of the default loss; a loss of the user's is taken as it is.

    Raises
    ------
    ZeroskipError
        If there is no default, or the loss is no finite scalar.
    """
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(survey.seed)
        output = batch.call(survey.model)
    loss = _next_token(output, batch, temperature) if survey.loss is None else survey.loss(output, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ZeroskipError(f"loss= returned {_what(loss)}: give a function of (output, batch) that returns a scalar")
    if not bool(torch.isfinite(loss).all()):
        raise ZeroskipError(f"the loss of a calibration batch is {float(loss.detach()):g}; check the data and the loss")
    if not loss.requires_grad:
        raise ZeroskipError("the loss does not depend on the weights: compute it from the model's output")
    return loss.reshape(())


def _next_token(output: object, batch: Batch, temperature: float) -> Tensor:
    logits, ids = getattr(output, "logits", None), batch.named.get("input_ids")
    if not isinstance(logits, Tensor) or not isinstance(ids, Tensor) or logits.shape[:-1] != ids.shape:
        raise ZeroskipError("loss= is missing: this model has no default one; give loss=lambda output, batch: ...")
    targets = ids.to(logits.device)[:, 1:]
    mask = batch.named.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        targets = targets.masked_fill(mask.to(targets.device)[:, 1:] == 0, -100)
    flat = logits[:, :-1].flatten(0, 1).float() / temperature
    return torch.nn.functional.cross_entropy(flat, targets.flatten())


def _what(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"

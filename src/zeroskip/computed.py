"""Layers whose weight is computed anew at each call, or is no tensor: they are no sites, and here is why in words."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from zeroskip.sites import sites_in

__all__ = ["computed_layers"]

KINDS = (nn.Linear, _ConvNd, nn.RNNBase, nn.MultiheadAttention)


def computed_layers(model: nn.Module) -> dict[str, str]:
    """Return {name of a layer without sites: why it has none; what to do}."""
    found = {name: _reason(module) for name, module in model.named_modules() if not sites_in(name, module)}
    return {name: reason for name, reason in found.items() if reason is not None}


def _reason(module: nn.Module) -> str | None:
    hooks = tuple(module._forward_pre_hooks.values())
    if any(isinstance(hook, BasePruningMethod) for hook in hooks):
        return "its weight is masked at each call; call torch.nn.utils.prune.remove on it first"
    if any(isinstance(hook, WeightNorm) for hook in hooks):
        return "its weight is normed at each call; call torch.nn.utils.remove_weight_norm on it first"
    if any(isinstance(hook, SpectralNorm) for hook in hooks):
        return "its weight is normed at each call; call torch.nn.utils.remove_spectral_norm on it first"
    if isinstance(module, KINDS) and parametrize.is_parametrized(module):
        return "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations on it first"
    theirs = type(module).__module__.startswith("torch.ao.nn.quantized.")
    if theirs and (callable(getattr(module, "weight", None)) or hasattr(module, "get_weight")):
        return "quantised by torch; take the model it was made from"
    return None

"""Root-mean-square norms in one call where their own forward takes six.

Every architecture has a class of its own for them. One counts if its name says so and if, tried with numbers, it gives
x / sqrt(mean(x^2) + eps) (weight + offset), offset 0 or 1: nothing is known of any architecture. Such a module gets a
class that derives from its own. What is out of the ordinary (gradients, tracing, other dtypes) is left to that one.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from zeroskip.decode_ops import can_normalise, normalise_plain
from zeroskip.derived import derive, restore
from zeroskip.native import is_plain

__all__ = ["attach_norms", "constants_of", "detach_norms"]

CONSTANTS = "zeroskip_norm"  # (eps, offset) of a module
SCALES = (1.0, 1e3, 1e-3)  # of the inputs that are tried; with the least of them eps counts
ROUNDINGS = 8  # theirs rounds after each of its operations


def constants_of(module: nn.Module) -> tuple[float, float] | None:
    """Return eps and the offset of the weight of a root-mean-square norm; None if the module is none.

    Parameters
    ----------
    module : nn.Module
        Its forward is called with random numbers.
    """
    weight = module._parameters.get("weight")
    if not type(module).__name__.endswith("RMSNorm") or "forward" in module.__dict__ or weight is None:
        return None
    if len(module._parameters) > 1 or module._buffers or module._modules or weight.dim() != 1:
        return None
    draw = torch.Generator().manual_seed(0)
    x = torch.cat([scale * torch.randn(2, weight.numel(), generator=draw) for scale in SCALES]).to(weight.dtype)
    found = [value for value in module.__dict__.values() if type(value) is float and 0 <= value < 1]
    with torch.inference_mode(False), torch.no_grad():
        if not can_normalise(x, weight):
            return None
        try:
            expected = type(module).forward(module, x)
        except Exception:  # not called with one tensor
            return None
        if not isinstance(expected, Tensor) or expected.shape != x.shape or expected.dtype is not x.dtype:
            return None
        for eps in found:
            for offset in (0.0, 1.0):
                off = (normalise_plain(x, weight, eps, offset).double() - expected.double()).abs()
                if bool((off <= ROUNDINGS * torch.finfo(x.dtype).eps * expected.double().abs()).all()):
                    return eps, offset
    return None


class OneCall(nn.Module):
    """Before the class of a norm: one call where that may be."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and is_plain(x := args[0]):
            weight = cast(Tensor, self._parameters["weight"])
            watched = weight.requires_grad and torch.is_grad_enabled()
            if not watched and type(weight.data) is Tensor and can_normalise(x, weight):
                return normalise_plain(x, weight, *self.__dict__[CONSTANTS])
        return super().forward(*args, **kwargs)


def attach_norms(model: nn.Module) -> None:
    """Let the norms of a model be one call each where they can; once."""
    for module in model.modules():
        if CONSTANTS not in module.__dict__ and (constants := constants_of(module)) is not None:
            module.__dict__[CONSTANTS] = constants
            derive(module, OneCall)


def detach_norms(model: nn.Module) -> None:
    """Give them their own classes back."""
    for module in model.modules():
        if module.__dict__.pop(CONSTANTS, None) is not None:
            restore(module)

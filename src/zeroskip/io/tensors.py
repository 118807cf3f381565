"""The tensors of a model as they are stored, and the names of their types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from zeroskip.dense_layers import DTYPES, OneDnnLinear
from zeroskip.errors import ZeroskipError
from zeroskip.io.container import Later

__all__ = ["dtype_name", "identity", "is_float", "tensors_of"]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_float(name: Any) -> bool:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def tensors_of(model: nn.Module) -> dict[str, Tensor | Later]:
    """Return the tensors a state dict holds, under all their names; none is copied.

    A weight that torch keeps prepacked becomes dense only when it is its turn to be written.
    """
    tensors: dict[str, Tensor | Later] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = name + "." if name else ""
        if isinstance(module, OneDnnLinear):
            shape = (module.out_features, module.in_features)
            tensors[f"{prefix}weight"] = Later(DTYPES[module.values], shape, _weight_of(module))
            if module.bias is not None:
                tensors[f"{prefix}bias"] = cast(Tensor, module.bias)
            continue
        own: dict[str, Any] = {}
        module._save_to_state_dict(own, prefix, keep_vars=True)
        for key, value in own.items():
            if not isinstance(value, Tensor):
                raise ZeroskipError(f"{key}: extra state ({type(value).__name__}) cannot be stored, only tensors can")
            tensors[key] = value
    return tensors


def _weight_of(module: OneDnnLinear) -> Callable[[], Tensor]:
    return lambda: module.weight


def identity(tensor: Tensor | Later) -> tuple[Any, ...]:
    """Return what two names of one tensor have in common: the memory it lies in, seen the same way."""
    if isinstance(tensor, Later) or tensor.device.type == "meta" or tensor.numel() == 0:
        return (id(tensor),)
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()

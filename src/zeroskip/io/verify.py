"""The blobs of a model that was just filled: each is read completely before it is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip import _core
from zeroskip.errors import ZeroskipError
from zeroskip.formats import Packed
from zeroskip.formats.blob import ALIGNMENT
from zeroskip.io.kinds import kind_of
from zeroskip.nn import PackedLinear
from zeroskip.planning.install import compiled_layers
from zeroskip.split_layers import aligned

__all__ = ["blobs_of", "verify"]


def blobs_of(model: nn.Module) -> dict[str, PackedLinear]:
    """Return the packed layers of a model by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def verify(model: nn.Module, where: Callable[[str], str | Path]) -> None:
    """Validate every blob of a model just filled, and copy those that do not lie on a 64-byte boundary.

    Parameters
    ----------
    where : callable
        From the name of a tensor to the file it came from, for the message.

    Raises
    ------
    ZeroskipError
        Naming file, tensor and problem.
    """
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    for site, module in compiled_layers(model):
        layer: Any = module
        kind, name, shape = kind_of(layer), f"{site}.weight", (layer.out_features, layer.in_features)
        if kind.blobs(layer) and layer.weight.data_ptr() % ALIGNMENT:
            layer.weight = nn.Parameter(aligned(layer.weight.detach()), requires_grad=False)
        for blob in kind.blobs(layer):
            _check_blob(blob, shape, where(name), name)
        try:
            kind.settle(layer, dtype)
        except ValueError as error:
            raise ZeroskipError(f"{where(name)}: {name}: {error}") from None


def _check_blob(blob: Tensor, shape: tuple[int, int], where: str | Path, name: str) -> None:
    try:
        _check_hash(blob)
        packed = Packed.from_blob(blob)
    except ValueError as error:
        raise ZeroskipError(f"{where}: {name}: {error}") from None
    if packed.shape != shape:
        raise ZeroskipError(f"{where}: {name}: the blob holds {packed.shape} where the model has {shape}")


def _check_hash(blob: Tensor) -> None:
    # The cache of validated blobs goes by address and header. A file mapped where another one was, with the same header
    # and other contents, would pass unseen, so what was just read is hashed whatever the cache says.
    if blob.dtype != torch.int8 or blob.dim() != 1 or blob.numel() < 64 or blob.numel() % 64:
        return  # refused by the check that follows
    found = _core.hash_blob(blob.data_ptr(), blob.numel())
    if bytes(blob[40:48].numpy()) != found.to_bytes(8, "little"):
        raise ZeroskipError("content hash differs: the bytes were changed or damaged")

"""The blobs of a model that was just filled: each is read completely before it is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from zeroskip import _core
from zeroskip.embedding_layers import PackedEmbedding
from zeroskip.errors import ZeroskipError
from zeroskip.formats import Packed
from zeroskip.nn import PackedLinear
from zeroskip.split_layers import PackedStack, aligned

__all__ = ["ALIGNMENT", "blobs_of", "verify"]

ALIGNMENT = 64  # bytes, of a blob in memory


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
    for site, stack in _stacks_of(model).items():
        stack.weight = nn.Parameter(aligned(stack.weight.detach()), requires_grad=False)
        name = f"{site}.weight"
        for i in range(len(stack.sizes)):
            _check_blob(stack.blob(i).detach(), (stack.out_features, stack.in_features), where(name), name)
    for site, module in blobs_of(model).items():
        name = f"{site}.weight"
        blob = module.weight.detach()
        if blob.data_ptr() % ALIGNMENT:
            blob = blob.clone()
            module.weight = nn.Parameter(blob, requires_grad=False)
        _check_blob(blob, (module.out_features, module.in_features), where(name), name)
        if isinstance(module, PackedEmbedding):
            try:
                module.settle(dtype)
            except ValueError as error:
                raise ZeroskipError(f"{where(name)}: {name}: {error}") from None


def _stacks_of(model: nn.Module) -> dict[str, PackedStack]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedStack)}


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

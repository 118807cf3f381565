"""A fingerprint of tensors and plain values."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["digest"]


def digest(tree: Any) -> bytes:
    """Hash the tensors, names and plain values of a tree of tuples, lists and dicts; other objects do not count."""
    total = hashlib.blake2b(digest_size=16)
    for path, leaf in pytree.tree_leaves_with_path(tree):
        if isinstance(leaf, Tensor):
            total.update(f"{pytree.keystr(path)} {leaf.dtype} {tuple(leaf.shape)} ".encode())
            total.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            total.update(f"{pytree.keystr(path)} {leaf!r} ".encode())
    return total.digest()

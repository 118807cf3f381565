"""What formats that keep a mask beside the weight have in common."""

from __future__ import annotations

from functools import partial
from math import prod

import torch
from torch import Tensor

from zeroskip.convert.base import Stored, later
from zeroskip.convert.bits import unpack_bits
from zeroskip.io.container import Later

__all__ = ["apply_mask"]


def apply_mask(stored: Stored, name: str, weight: Later, mask: Later, source: str) -> None:
    """Put in the weight with +0.0 wherever its mask is 0.

    Parameters
    ----------
    name : str
        The weight's.
    mask : Later
        Of the weight's shape and any type, 0 or 1; or uint8 [ceil(weights / 8)], bits of the flattened weight, the
        first one highest.
    source : str
        The mask's name, for messages.
    """
    packed = mask.dtype == torch.uint8 and mask.shape == (-(-prod(weight.shape) // 8),) != weight.shape
    if not packed and mask.shape != weight.shape:
        raise stored.bad(source, f"a mask {list(mask.shape)} for a weight {list(weight.shape)}")
    if not weight.dtype.is_floating_point:
        raise stored.bad(name, f"has a mask, but is {weight.dtype}")
    stored.put(name, later(weight, weight.shape, partial(_masked, stored, weight, mask, packed, source)), source)
    stored.sparse.add(name)


def _masked(stored: Stored, weight: Later, mask: Later, packed: bool, source: str) -> Tensor:
    bits = mask.make()
    dense = weight.make()
    if packed:
        keep = unpack_bits(bits, "high")[: dense.numel()].view(dense.shape)
    else:
        keep = bits != 0
        if not bool((bits[keep] == 1).all()):
            raise stored.bad(source, "holds other values than 0 and 1")
    return torch.where(keep, dense, torch.zeros((), dtype=dense.dtype)) + 0.0

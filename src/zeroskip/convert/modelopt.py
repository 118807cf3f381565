"""Sparsity of Model-Optimizer: ``P.weight`` with a buffer ``P._weight_mask``; its own state beside them is not needed.

Source: modelopt.torch.sparsity.
"""

from __future__ import annotations

from zeroskip.convert.base import Format, Stored
from zeroskip.convert.masks import apply_mask

__all__ = ["ModelOpt"]

MASK = "_weight_mask"


class ModelOpt(Format):
    name = "modelopt"

    def read(self, stored: Stored) -> int:
        sources = [name for name in stored.tensors if name.rpartition(".")[2] == MASK]
        for source in sources:
            name = source.removesuffix(MASK) + "weight"
            if name not in stored.tensors:
                raise stored.bad(source, f"there is no {name} beside it")
            mask, weight = stored.take(source), stored.take(name)
            apply_mask(stored, name, weight, mask, source)
        return len(sources)

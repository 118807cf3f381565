"""torch.nn.utils.prune: ``P_orig`` and ``P_mask`` in a state dict, where P is a parameter; the weight is their product.

Source: the documentation of torch.nn.utils.prune.
"""

from __future__ import annotations

from zeroskip.convert.base import Format, Stored
from zeroskip.convert.masks import apply_mask

__all__ = ["TorchPrune"]


class TorchPrune(Format):
    name = "torch.nn.utils.prune"

    def read(self, stored: Stored) -> int:
        names = [name.removesuffix("_orig") for name in stored.tensors if name.endswith("_orig")]
        names = [name for name in names if f"{name}_mask" in stored.tensors]
        for name in names:
            mask, weight = stored.take(f"{name}_mask"), stored.take(f"{name}_orig")
            apply_mask(stored, name, weight, mask, f"{name}_mask")
        return len(names)

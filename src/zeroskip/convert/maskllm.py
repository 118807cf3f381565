"""Masks by name: ``X.mask`` for a tensor X (or the weight of a module X), whole, or packed as MaskLLM publishes them.

MaskLLM's mask_compressed.npz holds a flattened mask as bits in bytes, the first weight in the highest bit.

Source: the MaskLLM repository.
"""

from __future__ import annotations

from zeroskip.convert.base import Format, Stored
from zeroskip.convert.masks import apply_mask

__all__ = ["MaskLLM"]

MASK = ".mask"


class MaskLLM(Format):
    name = "maskllm"

    def read(self, stored: Stored) -> int:
        pairs: list[tuple[str, str]] = []
        for source in stored.tensors:
            stem = source.removesuffix(MASK)
            name = next((name for name in (stem, f"{stem}.weight") if name in stored.tensors), None)
            if source.endswith(MASK) and name is not None:
                pairs.append((source, name))
        for source, name in pairs:
            mask, weight = stored.take(source), stored.take(name)
            apply_mask(stored, name, weight, mask, source)
        return len(pairs)

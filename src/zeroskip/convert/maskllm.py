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
        for source in (name for name in stored.tensors if name.endswith(MASK)):
            stem = source.removesuffix(MASK)
            # A model may have a buffer called mask; only in a file of masks does it mean the weight beside it.
            names = (stem, f"{stem}.weight") if source in stored.masks else (stem,)
            pairs += [(source, name) for name in names if name in stored.tensors][:1]
        for source, name in pairs:
            mask, weight = stored.take(source), stored.take(name)
            apply_mask(stored, name, weight, mask, source)
        return len(pairs)

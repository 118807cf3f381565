"""Sparsifiers of torch.ao: ``P.parametrizations.weight.original``, with its mask beside it or in another file.

The mask is ``P.parametrizations.weight.0.mask`` where the parametrization stores it. Later releases keep masks in the
sparsifier alone: save its state_dict and give that file as masks, where they are called ``P.weight.mask``.

Source: torch.ao.pruning, whose FakeSparsity is a parametrization of the weight.
"""

from __future__ import annotations

from zeroskip.convert.base import Format, Stored
from zeroskip.convert.masks import apply_mask

__all__ = ["TorchAo"]

ORIGINAL, MASK = ".original", ".0.mask"
WITHIN = ".parametrizations."


class TorchAo(Format):
    name = "torch.ao"

    def read(self, stored: Stored) -> int:
        originals = [name for name in stored.tensors if name.endswith(ORIGINAL) and WITHIN in name]
        for original in originals:
            stem = original.removesuffix(ORIGINAL)
            name = stem.replace(WITHIN, ".")
            weight = stored.take(original)
            mask = next((name for name in (stem + MASK, name + ".mask") if name in stored.tensors), None)
            if mask is None:
                raise stored.bad(original, "its mask is in no file; give the state_dict of the sparsifier as masks")
            apply_mask(stored, name, weight, stored.take(mask), mask)
        return len(originals)

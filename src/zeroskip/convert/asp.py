"""ASP of apex: ``P.weight`` with a buffer ``P.__weight_mma_mask`` beside it.

Source: apex.contrib.sparsity, which also keeps what was pruned as ``P.__weight_mma_pruned_p`` where it may come back.
"""

from __future__ import annotations

import re

from zeroskip.convert.base import Format, Stored
from zeroskip.convert.masks import apply_mask

__all__ = ["Asp"]

MASK = re.compile(r"(?P<module>.*\.|)__(?P<leaf>\w+)_mma_mask")
STASH = re.compile(r"(.*\.|)__\w+_mma_pruned_p")


class Asp(Format):
    name = "asp"

    def read(self, stored: Stored) -> int:
        found = {name: match for name in stored.tensors if (match := MASK.fullmatch(name))}
        for source, match in found.items():
            name = match["module"] + match["leaf"]
            if name not in stored.tensors:
                raise stored.bad(source, f"there is no {name} beside it")
            mask, weight = stored.take(source), stored.take(name)
            apply_mask(stored, name, weight, mask, source)
        for name in [name for name in stored.tensors if STASH.fullmatch(name)]:
            stored.take(name)
        return len(found)

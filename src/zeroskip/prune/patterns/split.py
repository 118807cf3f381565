"""Part dense, the rest N:M: "2:4+dense:25%" (a quarter of the inputs), "2:4+dense:25%rows" (of the outputs).

Both parts are ordinary products: x[:, part] times a dense matrix and x[:, rest] times an N:M one, or two stacks of
rows. Dense stays what would lose most: groups of M inputs that all rows share, or whole strips of rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from zeroskip.errors import ZeroskipError
from zeroskip.prune.patterns.base import Pattern, Scope, multiple_of
from zeroskip.prune.patterns.lowest import lowest
from zeroskip.prune.patterns.nm import NM

__all__ = ["Split"]


@dataclass(frozen=True)
class Split(Pattern):
    """`rest` on all but a fraction `part` of the inputs, or outputs where `by_rows`.

    Source: SpenseGPT (arXiv 2606.10445), a dense and a 2:4 region; ours takes any N:M and chooses the region by score.
    """

    examples = ("2:4+dense:25%", "2:4+dense:25%rows")

    rest: NM
    part: Fraction
    by_rows: bool

    @classmethod
    def read(cls, text: str) -> Pattern | None:
        found = re.fullmatch(r"([0-9:@]+)\+dense:([0-9]{1,9}(?:\.[0-9]{1,99})?)%(rows)?", text)
        rest = None if found is None else NM.read(found[1])
        if found is None or not isinstance(rest, NM):
            return None
        part = Fraction(found[2]) / 100
        if not 0 < part < 1:
            raise ZeroskipError(f"pattern {text!r}: the dense part is more than 0 % and less than 100 %")
        return Split(text, rest, part, found[3] is not None)

    @property
    def sparsity(self) -> float:
        return float((1 - self.part) * (1 - Fraction(self.rest.kept, self.rest.of)))

    @property
    def rows(self) -> int:
        return self.rest.strip

    @property
    def together(self) -> int:
        return self.rest.of

    @property
    def shared(self) -> bool:
        return False

    def check(self, shape: tuple[int, ...], name: str) -> None:
        self.rest.check(shape, name)
        size, what, unit = (shape[-2], "outputs", self.rows) if self.by_rows else (shape[-1], "inputs", self.rest.of)
        multiple_of(name, size, what, unit, self.name)
        dense = self.part * size
        if dense % unit:
            share = f"{100 * float(self.part):g} % of {size} {what} are {float(dense):g}"
            raise ZeroskipError(f"{name}: {share}, not a multiple of {unit}, which {self.name} needs")

    def dense(self, score: Tensor) -> Tensor:
        """Return [out, in] bool: the dense region, the units that would lose the largest sum of `score` [out, in]."""
        rows, k = score.shape
        lost = score.masked_fill(self.rest.select(score, 0.0), 0.0)
        sums = (lost.view(-1, self.rows * k) if self.by_rows else lost.sum(0).view(-1, self.rest.of)).sum(1)
        pruned = lowest(sums.unsqueeze(0), len(sums) - int(self.part * len(sums)))[0]
        units = ~pruned.repeat_interleave(self.rows if self.by_rows else self.rest.of)
        return (units.unsqueeze(1) if self.by_rows else units).expand(rows, k)

    def select(self, score: Tensor, sparsity: float, scope: Scope = "tensor") -> Tensor:
        return torch.logical_or(self.rest.select(score, sparsity), self.dense(score))

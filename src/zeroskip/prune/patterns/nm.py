"""N kept of every M consecutive inputs: "N:M", or "N:M@V", the choice shared by strips of V rows."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from zeroskip.errors import ZeroskipError
from zeroskip.prune.patterns.base import Pattern, Scope, multiple_of
from zeroskip.prune.patterns.lowest import lowest

__all__ = ["NM", "PAIR", "Kept"]

PAIR = "([0-9]{1,9}):([0-9]{1,9})"  # N:M in a name


@dataclass(frozen=True)
class Kept(Pattern, named=False):
    """`kept` of every `of` consecutive inputs, whatever else a kind asks."""

    kept: int
    of: int

    @staticmethod
    def pair(text: str, n: str, m: str) -> tuple[int, int]:
        """Return N and M of the name `text`, which must make a pattern."""
        kept, of = int(n), int(m)
        if not 1 <= kept < of:
            raise ZeroskipError(f"pattern {text!r}: N:M keeps N of every M inputs, so 1 <= N < M")
        return kept, of

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.of

    @property
    def together(self) -> int:
        return self.of

    @property
    def steps(self) -> int:
        return self.of


@dataclass(frozen=True)
class NM(Kept):
    """The choice is shared by `strip` rows, the last strip may be short."""

    examples = ("2:4", "8:16@64")

    strip: int

    @classmethod
    def read(cls, text: str) -> Pattern | None:
        if found := re.fullmatch(rf"{PAIR}(?:@([0-9]{{1,9}}))?", text):
            kept, of, strip = *Kept.pair(text, found[1], found[2]), int(found[3] or 1)
            if strip < 1:
                raise ZeroskipError(f"pattern {text!r}: a strip has at least one row")
            return NM(text, kept, of, strip)
        if found := re.fullmatch(rf"([0-9]{{1,9}}):{PAIR}", text):
            v, n, m = found.groups()
            raise ZeroskipError(
                f"pattern {text!r} (V:N:M) is not served: write {f'{n}:{m}@{v}'!r}, N of every M inputs kept, "
                "the choice shared by strips of V rows"
            )
        return None

    @property
    def rows(self) -> int:
        return self.strip

    @property
    def permutes(self) -> bool:
        return True

    def with_kept(self, kept: int) -> NM:
        name = f"{kept}:{self.of}" + (f"@{self.strip}" if "@" in self.name else "")
        return NM(name, kept, self.of, self.strip)

    def check(self, shape: tuple[int, ...], name: str) -> None:
        multiple_of(name, shape[-1], "inputs", self.of, self.name)

    def select(self, score: Tensor, sparsity: float, scope: Scope = "tensor") -> Tensor:
        rows, columns = score.shape
        strips = -(-rows // self.strip)
        which = torch.arange(rows, device=score.device) // self.strip
        summed = score
        if self.strip > 1:
            summed = score.new_zeros(strips, columns).index_add_(0, which, score)
        dropped = lowest(summed.reshape(-1, self.of), self.of - self.kept).view(strips, columns)
        return ~dropped[which]

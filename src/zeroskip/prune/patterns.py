"""Where the zeros of a matrix may stand, and the choice of exactly as many as were asked.

"unstructured"   anywhere
"N:M"            N kept of every M consecutive inputs of a row
"N:M@V"          the same, the choice shared by strips of V rows (the last strip may be short)
"block:RxC"      whole blocks of R outputs by C inputs
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zeroskip.errors import ZeroskipError, suggest

__all__ = ["NM", "Block", "Pattern", "Scope"]

Scope = Literal["row", "tensor"]


@dataclass(frozen=True)
class Pattern:
    """A pattern of zeros.

    Attributes
    ----------
    name : str
        As `Pattern.parse` reads it.
    sparsity : float or None
        The fraction of zeros the pattern implies; None where it is free.
    rows : int
        How many consecutive rows share one support (1: every row has its own).
    """

    name: str

    @property
    def sparsity(self) -> float | None:
        return None

    @property
    def rows(self) -> int:
        return 1

    @property
    def grouped(self) -> bool:
        """Whether the order of rows or columns matters to it."""
        return True

    def shares(self, sparsity: float, groups: int, shape: tuple[int, ...]) -> list[float]:
        """Return the sparsity of each of `groups` matrices [out, in]; together they drop the exact count."""
        return [sparsity] * groups

    @staticmethod
    def parse(text: str) -> Pattern:
        """Read a pattern's name.

        Raises
        ------
        ZeroskipError
            On an unknown name, on N:M with N not in [1, M), on V:N:M.
        """
        if not isinstance(text, str):
            raise ZeroskipError(f"pattern is {text!r}: give a string such as '8:16@64'")
        if text == "unstructured":
            return Block("unstructured", 1, 1)
        if found := re.fullmatch(r"block:([0-9]+)x([0-9]+)", text):
            height, width = map(int, found.groups())
            if height < 1 or width < 1:
                raise ZeroskipError(f"pattern {text!r}: a block is at least 1x1")
            return Block(text, height, width)
        if found := re.fullmatch(r"([0-9]+):([0-9]+)(?:@([0-9]+))?", text):
            kept, of, strip = int(found[1]), int(found[2]), int(found[3] or 1)
            if not 1 <= kept < of:
                raise ZeroskipError(f"pattern {text!r}: N:M keeps N of every M inputs, so 1 <= N < M")
            if strip < 1:
                raise ZeroskipError(f"pattern {text!r}: a strip has at least one row")
            return NM(text, kept, of, strip)
        if found := re.fullmatch(r"([0-9]+):([0-9]+):([0-9]+)", text):
            v, n, m = found.groups()
            raise ZeroskipError(
                f"pattern {text!r} (V:N:M) is not served: write {f'{n}:{m}@{v}'!r}, N of every M inputs kept, "
                "the choice shared by strips of V rows"
            )
        known = ["unstructured", "2:4", "8:16@64", "block:16x1"]
        raise ZeroskipError(f"unknown pattern {text!r}" + suggest(text, known))

    def check(self, shape: tuple[int, ...], name: str) -> None:
        """Raise unless a matrix [..., out, in] of the site `name` can hold the pattern."""
        raise NotImplementedError

    def select(self, score: Tensor, sparsity: float, scope: Scope = "tensor") -> Tensor:
        """Choose what to keep.

        Parameters
        ----------
        score : Tensor
            [out, in] fp32, the larger the more worth keeping; not modified. Scores of a block or strip are summed.
        sparsity : float
            Fraction of zeros in [0, 1); N:M patterns use their own.
        scope : "row" or "tensor"
            Where scores compete. "tensor": exactly round(n * sparsity) units go. "row": floor in each row, the
            remainder to the rows whose next score is lowest. Of equal scores the lower index is kept.

        Returns
        -------
        Tensor
            [out, in] bool, True where the weight is kept.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of `height` outputs by `width` inputs; 1 x 1 is unstructured."""

    height: int
    width: int

    @property
    def rows(self) -> int:
        return self.height

    @property
    def grouped(self) -> bool:
        return self.height * self.width > 1

    def check(self, shape: tuple[int, ...], name: str) -> None:
        for what, size, multiple in (("outputs", shape[-2], self.height), ("inputs", shape[-1], self.width)):
            if size % multiple:
                raise ZeroskipError(f"{name}: {size} {what} are not a multiple of {multiple}, which {self.name} needs")

    def shares(self, sparsity: float, groups: int, shape: tuple[int, ...]) -> list[float]:
        units = shape[-2] // self.height * (shape[-1] // self.width)
        drop = round(groups * units * sparsity)
        return [(drop * (group + 1) // groups - drop * group // groups) / units for group in range(groups)]

    def select(self, score: Tensor, sparsity: float, scope: Scope = "tensor") -> Tensor:
        rows, columns = score.shape
        grid = score
        if self.height * self.width > 1:
            grid = score.reshape(rows // self.height, self.height, columns // self.width, self.width).sum((1, 3))
        drop = round(grid.numel() * sparsity)
        keep = ~(_lowest_by_row(grid, drop) if scope == "row" else _lowest(grid.reshape(1, -1), drop).view_as(grid))
        return keep.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)


@dataclass(frozen=True)
class NM(Pattern):
    """`kept` of every `of` consecutive inputs; the choice is shared by `strip` rows."""

    kept: int
    of: int
    strip: int

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.of

    @property
    def rows(self) -> int:
        return self.strip

    def check(self, shape: tuple[int, ...], name: str) -> None:
        if shape[-1] % self.of:
            raise ZeroskipError(f"{name}: {shape[-1]} inputs are not a multiple of {self.of}, which {self.name} needs")

    def select(self, score: Tensor, sparsity: float, scope: Scope = "tensor") -> Tensor:
        rows, columns = score.shape
        strips = -(-rows // self.strip)
        which = torch.arange(rows, device=score.device) // self.strip
        summed = score
        if self.strip > 1:
            summed = score.new_zeros(strips, columns).index_add_(0, which, score)
        dropped = _lowest(summed.reshape(-1, self.of), self.of - self.kept).view(strips, columns)
        return ~dropped[which]


def _lowest(score: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest of every row of `score` [rows, n]; of equal scores the higher index goes first."""
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    limit = score.kthvalue(count, dim=1, keepdim=True).values
    below, equal = score < limit, score == limit
    room = count - below.sum(1, keepdim=True)
    from_the_right = equal.flip(1).cumsum(1, dtype=torch.int32).flip(1)
    return below | (equal & (from_the_right <= room))


def _lowest_by_row(score: Tensor, total: int) -> Tensor:
    """Mark the `total` lowest of `score` [rows, n], equally many in each row up to one."""
    each, rest = divmod(total, len(score))
    marked = _lowest(score, each)
    if rest:
        following = score.masked_fill(marked, torch.inf).amin(1)
        extra = _lowest(following.unsqueeze(0), rest)[0]
        marked[extra] = _lowest(score[extra], each + 1)
    return marked

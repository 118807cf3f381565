"""What a pattern is: a name, what it asks of a shape, and the choice of exactly as many zeros as were asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from zeroskip.errors import ZeroskipError, suggest

__all__ = ["Pattern", "Scope", "multiple_of"]

Scope = Literal["row", "tensor", "columns"]


@dataclass(frozen=True)
class Pattern:
    """A pattern of zeros. Subclassing registers a kind, which reads its own names; with ``named=False`` it has none.

    Attributes
    ----------
    name : str
        As `Pattern.parse` reads it.
    sparsity : float or None
        The fraction of zeros the pattern implies; None where it is free.
    rows : int
        How many consecutive rows share one support (1: every row has its own).
    """

    known: ClassVar[list[type[Pattern]]] = []
    examples: ClassVar[tuple[str, ...]] = ()

    name: str

    def __init_subclass__(cls, named: bool = True) -> None:
        if named:
            Pattern.known.append(cls)

    @classmethod
    def read(cls, text: str) -> Pattern | None:
        """Return the pattern of this name, None where it is none of this kind; raise where it is a wrong one."""
        raise NotImplementedError

    @staticmethod
    def parse(text: str) -> Pattern:
        """Read a pattern's name.

        Raises
        ------
        ZeroskipError
            On an unknown name, and on numbers that make no pattern, such as N:M with N not in [1, M).
        """
        if not isinstance(text, str):
            raise ZeroskipError(f"pattern is {text!r}: give a string such as '8:16@64'")
        for kind in Pattern.known:
            found = kind.read(text)
            if found is not None:
                return found
        examples = [example for kind in Pattern.known for example in kind.examples]
        raise ZeroskipError(f"unknown pattern {text!r}" + suggest(text, examples))

    @property
    def sparsity(self) -> float | None:
        return None

    @property
    def rows(self) -> int:
        return 1

    @property
    def permutes(self) -> bool:
        """Whether `zeroskip.permute` can make room for it."""
        return False

    @property
    def scope(self) -> Scope | None:
        """Where scores compete; None where the method decides on that."""
        return None

    @property
    def together(self) -> int | None:
        """How many consecutive inputs are chosen at once; None where any number may be."""
        return None

    @property
    def shared(self) -> bool:
        """Whether a budget may change its sparsity."""
        return True

    @property
    def steps(self) -> int | None:
        """M, where the sparsities it can have are multiples of 1/M; None where any number of units may be zero."""
        return None

    def with_kept(self, kept: int) -> Pattern:
        """Return the pattern with another N of the same M, from 1 to M (none of which is zero)."""
        raise NotImplementedError

    def shares(self, sparsity: float, groups: int, shape: tuple[int, ...]) -> list[float]:
        """Return the sparsity of each of `groups` matrices [out, in]; together they drop the exact count."""
        return [sparsity] * groups

    def check(self, shape: tuple[int, ...], name: str) -> None:
        """Raise unless a matrix [..., out, in] of the site `name` can hold the pattern."""

    def select(self, score: Tensor, sparsity: float, scope: Scope = "tensor") -> Tensor:
        """Choose what to keep.

        Parameters
        ----------
        score : Tensor
            [out, in] fp32, the larger the more worth keeping; not modified. Scores of a block or strip are summed.
        sparsity : float
            Fraction of zeros in [0, 1); patterns that imply one use their own.
        scope : "row" or "tensor"
            Where scores compete, unless the pattern says so itself. "tensor": exactly round(n * sparsity) units go.
            "row": floor in each row, the remainder to the rows whose next score is lowest. Of equal scores the lower
            index is kept.

        Returns
        -------
        Tensor
            [out, in] bool, True where the weight is kept.
        """
        raise NotImplementedError


def multiple_of(name: str, size: int, what: str, multiple: int, pattern: str) -> None:
    """Raise unless the outputs or inputs of a site are a multiple of what its pattern needs."""
    if size % multiple:
        raise ZeroskipError(f"{name}: {size} {what} are not a multiple of {multiple}, which {pattern} needs")

"""What the library raises on bad input, and the hint for a misspelt name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Real
from types import UnionType

__all__ = ["ZeroskipError", "expect", "expect_seconds", "first_line", "suggest"]


class ZeroskipError(ValueError):
    """Bad input: one line that states the value seen and the remedy."""


def expect(name: str, value: object, kind: type | UnionType, what: str) -> None:
    """Raise unless `value` is a `kind`; `what` says in words what to give."""
    if not isinstance(value, kind):
        raise ZeroskipError(f"{name} is a {type(value).__name__}: give {what}")


def expect_seconds(name: str, value: float) -> None:
    """Raise unless `value` is a time to spend."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ZeroskipError(f"{name} is {value!r}: give seconds above 0")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error of other code says, its type's name where it says nothing.

    A line that ends with a colon says something only with the next one.
    """
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


def suggest(name: object, known: Iterable[str]) -> str:
    """Return ``' (did you mean X?)'`` for the nearest known name, else the list of known names.

    Examples
    --------
    >>> suggest("wnada", ["wanda", "magnitude"])
    " (did you mean 'wanda'?)"
    """
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    if near:
        return f" (did you mean {near[0]!r}?)"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f" (known: {shown})" if known else " (there are none)"

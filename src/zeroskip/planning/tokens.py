"""The token counts that a model is to be good at, and how much each matters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zeroskip.errors import ZeroskipError
from zeroskip.model import Site
from zeroskip.planning.machine import available_memory_bytes

__all__ = ["Tokens"]


@dataclass(frozen=True)
class Tokens:
    """The token counts to be good at.

    Attributes
    ----------
    counts : tuple of int
        Ascending.
    weights : tuple of float or None
        How often each occurs; a weighted time is then the sum of weight x time. None (counts given as a list): every
        count matters alike, so times are taken relative to the fastest dense at that count.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    @classmethod
    def parse(cls, tokens: object) -> Tokens:
        """Read an int, an iterable of ints or a mapping from count to weight.

        Raises
        ------
        ZeroskipError
            If there are none, a count is not a positive int, or a weight is not a positive finite number.
        """
        if isinstance(tokens, Tokens):
            return tokens
        given = (tokens,) if isinstance(tokens, int) else tokens
        try:
            counts = list(given)  # type: ignore[call-overload]
        except TypeError:
            raise ZeroskipError(f"tokens is {tokens!r}: give counts such as (1, 32, 512)") from None
        if not counts:
            raise ZeroskipError("tokens is empty: give at least one token count, such as (1, 32, 512)")
        for count in counts:
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ZeroskipError(f"tokens holds {count!r}: a token count is a whole number of at least 1")
        if not isinstance(given, Mapping):
            return cls(tuple(sorted(set(counts))))
        for count, weight in given.items():
            if not isinstance(weight, int | float) or not math.isfinite(weight) or weight <= 0:
                raise ZeroskipError(f"tokens[{count}] is {weight!r}: a weight is a number above 0")
        return cls(tuple(sorted(counts)), tuple(float(given[count]) for count in sorted(counts)))

    def check_room(self, sites: Iterable[Site]) -> None:
        """Raise ZeroskipError if the activations of a linear site at the largest count do not fit in free memory."""
        most, free = max(self.counts), available_memory_bytes()
        for site in sites:
            # What goes in and what comes out, each once more while results are checked.
            needed = 2 * most * sum(site.shape[1:]) * site.weight().element_size()
            if needed > free:
                raise ZeroskipError(
                    f"tokens holds {most}: measuring {site.name} with so many takes {needed / 1e9:.1f} GB, "
                    f"and {free / 1e9:.1f} GB are free; leave it out"
                )

    def to_dict(self) -> dict[str, Any]:
        return {"counts": list(self.counts), "weights": None if self.weights is None else list(self.weights)}

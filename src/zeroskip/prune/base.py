"""A pruning method as a composition: statistics it needs, a score, the pattern's choice, then solvers behind a '+'.

One method or solver is one short file; subclassing registers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from zeroskip.errors import ZeroskipError, suggest
from zeroskip.prune.patterns import Pattern, Scope

__all__ = ["Method", "Problem", "Recipe", "Solution", "Solver", "methods"]


@dataclass(frozen=True)
class Problem:
    """One matrix to be pruned.

    Attributes
    ----------
    name : str
        The site, for messages.
    weight : Tensor
        [out, in] fp32; not modified.
    stats : mapping of str to Tensor
        The statistics that were collected: "sumsq" [in], "gram" [in, in] (names in `zeroskip.calibrate.stats`).
    generator : torch.Generator
        On the weight's device, seeded from the run's seed and the site's name.
    """

    name: str
    weight: Tensor
    pattern: Pattern
    sparsity: float
    stats: Mapping[str, Tensor]
    generator: torch.Generator


@dataclass
class Solution:
    """What to write: `weight` [out, in] fp32, zero where `keep` [out, in] bool is False, and remarks for the report."""

    keep: Tensor
    weight: Tensor
    notes: list[str] = field(default_factory=list)


class Method:
    """A way to choose the zeros. A subclass sets `name`, `needs`, `scope` and writes `score`.

    A method that moves weights while it chooses (OBS sweeps, ADMM) overrides `run` instead.
    """

    known: ClassVar[dict[str, type[Method]]] = {}
    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    scope: ClassVar[Scope] = "tensor"

    def __init_subclass__(cls) -> None:
        Method.known[cls.name] = cls

    def serves(self, pattern: Pattern) -> bool:
        """Whether the method can choose zeros of this pattern."""
        return True

    def score(self, problem: Problem) -> Tensor:
        """Return [out, in] fp32, the larger the more worth keeping."""
        raise NotImplementedError

    def run(self, problem: Problem) -> Solution:
        """Choose the support and the weights on it."""
        keep = problem.pattern.select(self.score(problem), problem.sparsity, self.scope)
        return Solution(keep, problem.weight.masked_fill(~keep, 0.0))


class Solver:
    """What may follow a method behind a '+': it changes the kept weights, never the support."""

    known: ClassVar[dict[str, type[Solver]]] = {}
    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        Solver.known[cls.name] = cls

    def refine(self, problem: Problem, solution: Solution) -> Solution:
        """Return a better solution on the same support."""
        raise NotImplementedError


def methods() -> list[str]:
    """Return the names that `prune` takes: every method alone and with every solver behind it."""
    return [name + tail for name in Method.known for tail in ("", *(f"+{solver}" for solver in Solver.known))]


@dataclass(frozen=True)
class Recipe:
    """A method by its full name, ready to run on one matrix after another."""

    name: str
    method: Method
    solvers: tuple[Solver, ...]

    @staticmethod
    def parse(name: str) -> Recipe:
        """Read "method" or "method+solver".

        Raises
        ------
        ZeroskipError
            On an unknown name; it suggests the nearest.
        """
        head, *tails = str(name).split("+")
        if head not in Method.known or any(tail not in Solver.known for tail in tails):
            raise ZeroskipError(f"unknown method {name!r}" + suggest(str(name), methods()))
        return Recipe(name, Method.known[head](), tuple(Solver.known[tail]() for tail in tails))

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the statistics to collect, each once."""
        parts: list[Method | Solver] = [self.method, *self.solvers]
        return tuple(dict.fromkeys(need for part in parts for need in part.needs))

    def run(self, problem: Problem) -> tuple[Solution, Solution]:
        """Return (after the method, after the solvers)."""
        first = last = self.method.run(problem)
        if bool(first.keep.all()):  # nothing went, so nothing need be made up for, nor rounded on the way
            first = Solution(first.keep, problem.weight, first.notes)
            return first, first
        for solver in self.solvers:
            last = solver.refine(problem, last)
        return first, last

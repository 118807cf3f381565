"""A pruning method as a composition: statistics it needs, a score, the pattern's choice, then solvers behind a '+'.

One method or solver is one short file; subclassing registers it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from zeroskip.calibrate import Block, Lesson
from zeroskip.errors import ZeroskipError, suggest
from zeroskip.model import Site
from zeroskip.prune.patterns import Pattern, Scope

__all__ = ["BlockSolver", "Lessons", "Method", "Problem", "Recipe", "Solution", "Solver", "methods"]


Lessons = Sequence[Callable[[], Lesson | None]]


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


class BlockSolver:
    """What may follow at the end of a name: it changes a whole block once its sites are pruned, never their support."""

    known: ClassVar[dict[str, type[BlockSolver]]] = {}
    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        BlockSolver.known[cls.name] = cls

    def refine(self, block: Block, sites: Sequence[Site], lessons: Lessons, draw: torch.Generator) -> list[str]:
        """Change the parameters of `block` in place; return remarks for the report.

        Parameters
        ----------
        sites : sequence of Site
            Those of the block that were pruned.
        lessons : sequence of callables
            Each gives a `zeroskip.calibrate.Lesson`, made anew at every call, or None.
        draw : torch.Generator
            On the CPU, seeded from the run's seed and the block's name.
        """
        raise NotImplementedError


def methods() -> list[str]:
    """Return the names that `prune` takes: every method alone, with every solver, and with all of them behind it."""
    tails = ["", *(f"+{solver}" for solver in Solver.known)]
    tails += [f"{tails[-1]}+{solver}" for solver in BlockSolver.known]
    return [name + tail for name in Method.known for tail in tails]


@dataclass(frozen=True)
class Recipe:
    """A method by its full name, ready to run on one matrix after another, and on one block after another."""

    name: str
    method: Method
    solvers: tuple[Solver, ...]
    block_solvers: tuple[BlockSolver, ...] = ()

    @staticmethod
    def parse(name: str) -> Recipe:
        """Read "method", "method+solver", or more of them, those that work on whole blocks last.

        Raises
        ------
        ZeroskipError
            On an unknown name; it suggests the nearest.
        """
        head, *tails = str(name).split("+")
        sites = [tail for tail in tails if tail in Solver.known]
        blocks = [tail for tail in tails if tail in BlockSolver.known]
        if head not in Method.known or tails != sites + blocks:
            raise ZeroskipError(f"unknown method {name!r}" + suggest(str(name), methods()))
        return Recipe(
            name,
            Method.known[head](),
            tuple(Solver.known[tail]() for tail in sites),
            tuple(BlockSolver.known[tail]() for tail in blocks),
        )

    @property
    def needs_data(self) -> bool:
        """Whether it cannot run without calibration."""
        return bool(self.needs or self.block_solvers)

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

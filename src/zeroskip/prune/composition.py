"""A method by its full name: "wanda", "wanda+ls", "obs+ls+tune"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from zeroskip.calibrate import Stat
from zeroskip.errors import ZeroskipError, suggest
from zeroskip.prune.base import BlockSolver, Method, Problem, Solution, Solver
from zeroskip.prune.numerics import in_range

__all__ = ["Composition", "methods"]


def methods() -> list[str]:
    """Return the names that `prune` takes: every method alone, with every solver, and with more and more of those that
    work on blocks."""
    plain = ["", *(f"+{name}" for name, solver in Solver.known.items() if not solver.rounds)]
    blocks = [plain[-1] + tail for tail in accumulate(f"+{solver}" for solver in sorted(BlockSolver.known, key=_whole))]
    codes = ["", *(f"+{solver}" for solver in Solver.known)]
    return [
        name + tail for name, kind in Method.known.items() for tail in (codes if kind.quantizes else plain + blocks)
    ]


@dataclass(frozen=True)
class Composition:
    """A method by its full name, ready to run on one matrix after another, and on one block after another."""

    name: str
    method: Method
    solvers: tuple[Solver, ...]
    block_solvers: tuple[BlockSolver, ...] = ()

    @staticmethod
    def parse(name: str) -> Composition:
        """Read "method", "method+solver", or more of them, then those that work on whole blocks, then on the model.

        Raises
        ------
        ZeroskipError
            On an unknown name, where it suggests the nearest, and on one given twice.
        """
        heads = [known for known in Method.known if f"{name}+".startswith(f"{known}+")]
        head = max(heads, key=len, default="")
        tails = str(name)[len(head) :].split("+")[1:]
        sites = [tail for tail in tails if tail in Solver.known]
        blocks = sorted((tail for tail in tails if tail in BlockSolver.known), key=_whole)
        if not head or tails != sites + blocks:
            raise ZeroskipError(f"unknown method {name!r}" + suggest(str(name), methods()))
        twice = [tail for tail in tails if tails.count(tail) > 1]
        if twice:
            raise ZeroskipError(f"method {name!r} names {twice[0]!r} twice: leave one out")
        lost = [tail for tail in sites if Solver.known[tail].rounds and not Method.known[head].quantizes]
        if lost:
            raise ZeroskipError(f"method {name!r}: {lost[0]!r} moves integers, and {head!r} makes none; leave it out")
        if blocks and Method.known[head].quantizes:
            raise ZeroskipError(f"method {name!r}: {blocks[0]!r} would move weights off their integers; leave it out")
        return Composition(
            name,
            Method.known[head](),
            tuple(Solver.known[tail]() for tail in sites),
            tuple(BlockSolver.known[tail]() for tail in blocks),
        )

    @property
    def needs_data(self) -> bool:
        """Whether it cannot run without calibration."""
        return bool(self.needs or self.block_solvers or self.method.batched)

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the statistics to collect, each once."""
        parts: list[Method | Solver] = [self.method, *self.solvers]
        return tuple(dict.fromkeys(need for part in parts for need in part.needs))

    @property
    def whole(self) -> bool:
        """Whether a solver of it works on the whole model."""
        return any(solver.whole for solver in self.block_solvers)

    def tokens_wanted(self, inputs: int) -> int:
        """Return how many calibration tokens a matrix of so many inputs should see."""
        return math.ceil(max((Stat.known[need].wants for need in self.needs), default=0.0) * inputs)

    def run(self, problem: Problem) -> tuple[Solution, Solution]:
        """Return (after the method, after the solvers)."""
        first = last = self.method.run(problem)
        if first.scales is None and bool(
            first.keep.all()
        ):  # nothing went, so nothing need be made up for, nor rounded on the way
            first = Solution(first.keep, problem.weight, first.notes)
            return first, first
        for solver in self.solvers:
            last = solver.refine(problem, last)
        if "gram" in problem.stats:
            in_range(last.weight, problem.stats["gram"], problem.name)
        return first, last


def _whole(solver: str) -> bool:
    return BlockSolver.known[solver].whole

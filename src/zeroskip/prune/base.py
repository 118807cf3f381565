"""A pruning method as a composition: statistics it needs, a score, the pattern's choice, then solvers behind a '+'.

One method or solver is one short file; subclassing registers it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from zeroskip.calibrate import Batch, Block, Lesson
from zeroskip.model import Site
from zeroskip.prune.patterns import Pattern, Scope

__all__ = [
    "BlockSolver",
    "Integers",
    "Lessons",
    "Loss",
    "Method",
    "Problem",
    "Solution",
    "Solver",
    "Survey",
]

Lessons = Sequence[Callable[[], Lesson | None]]

Loss = Callable[[object, Batch], Tensor]
"""(what the model returned, the batch) -> a scalar."""


@dataclass(frozen=True)
class Integers:
    """What weights are rounded to: `values` "int8" or "int4", one scale for `group_size` inputs of a row."""

    values: str
    group_size: int


@dataclass(frozen=True)
class Survey:
    """The whole model before anything moved, for methods that look at it as a whole.

    Attributes
    ----------
    model : nn.Module
        In eval mode; to be left as it was found.
    sites : list of Site
    batches : list of Batch
        Empty where no calibration was given.
    loss : callable or None
        The user's.
    patterns, sparsity : mapping
        What is asked of each site, by its name.
    """

    model: nn.Module
    sites: Sequence[Site]
    batches: Sequence[Batch]
    loss: Loss | None
    patterns: Mapping[str, Pattern]
    sparsity: Mapping[str, float]
    seed: int


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
        The statistics that were collected: "sum", "sumsq" [in], "gram" [in, in] (names in
        `zeroskip.calibrate.stats`), and what the method's survey found.
    generator : torch.Generator
        On the weight's device, seeded from the run's seed and the site's name.
    tokens : int
        How many tokens the statistics saw.
    integers : Integers or None
        For methods that quantise.
    """

    name: str
    weight: Tensor
    pattern: Pattern
    sparsity: float
    stats: Mapping[str, Tensor]
    generator: torch.Generator
    tokens: int = 0
    integers: Integers | None = None


@dataclass
class Solution:
    """What to write.

    Attributes
    ----------
    keep : Tensor
        [out, in] bool.
    weight : Tensor
        [out, in] fp32, zero where `keep` is False.
    notes : list of str
        Remarks for the report.
    scales : Tensor or None
        [out, ceil(in / group_size)] fp16 or fp32, where every weight is an integer times the scale of its group.
    """

    keep: Tensor
    weight: Tensor
    notes: list[str] = field(default_factory=list)
    scales: Tensor | None = None


class Method:
    """A way to choose the zeros. A subclass sets `name`, `needs`, `scope` and writes `score`.

    A method that moves weights while it chooses (OBS sweeps, ADMM) overrides `run` instead.

    Attributes
    ----------
    chooses : bool
        False where the zeros are those that the weight has: no sparsity is asked then.
    quantizes : bool
        Whether its solutions have scales.
    surveys : bool
        Whether `survey` is to be called, with the batches where `batched`.
    """

    known: ClassVar[dict[str, type[Method]]] = {}
    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    scope: ClassVar[Scope] = "tensor"
    chooses: ClassVar[bool] = True
    quantizes: ClassVar[bool] = False
    surveys: ClassVar[bool] = False
    batched: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            Method.known[cls.name] = cls

    def serves(self, pattern: Pattern) -> bool:
        """Whether the method can choose zeros of this pattern."""
        return True

    def survey(self, survey: Survey) -> dict[str, dict[str, Tensor]]:
        """Look at the whole model before it is pruned; return {site: {statistic: [groups, ...]}}."""
        raise NotImplementedError

    def score(self, problem: Problem) -> Tensor:
        """Return [out, in] fp32, the larger the more worth keeping."""
        raise NotImplementedError

    def run(self, problem: Problem) -> Solution:
        """Choose the support and the weights on it."""
        keep = problem.pattern.select(self.score(problem), problem.sparsity, self.scope)
        return Solution(keep, problem.weight.masked_fill(~keep, 0.0))


class Solver:
    """What may follow a method behind a '+': it changes the kept weights, never the support.

    Attributes
    ----------
    rounds : bool
        Whether it only serves methods that quantise.
    """

    known: ClassVar[dict[str, type[Solver]]] = {}
    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    rounds: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        Solver.known[cls.name] = cls

    def refine(self, problem: Problem, solution: Solution) -> Solution:
        """Return a better solution on the same support."""
        raise NotImplementedError


class BlockSolver:
    """What may follow at the end of a name: it changes a whole block once its sites are pruned, never their support.

    Attributes
    ----------
    whole : bool
        Whether its one block is the whole model, once all blocks are pruned. Such solvers come last in a name.
    """

    known: ClassVar[dict[str, type[BlockSolver]]] = {}
    name: ClassVar[str]
    whole: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            BlockSolver.known[cls.name] = cls

    def refine(
        self, block: Block, parts: Sequence[Block], sites: Sequence[Site], lessons: Lessons, draw: torch.Generator
    ) -> list[str]:
        """Change parameters of `block` in place; return remarks for the report.

        Parameters
        ----------
        parts : sequence of Block
            Where something may change: the block itself, or all pruned blocks of the whole model.
        sites : sequence of Site
            Those in `parts` that were pruned by a method that asks for this solver.
        lessons : sequence of callables
            Each gives a `zeroskip.calibrate.Lesson`, made anew at every call, or None.
        draw : torch.Generator
            On the CPU, seeded from the run's seed and the block's name.
        """
        raise NotImplementedError

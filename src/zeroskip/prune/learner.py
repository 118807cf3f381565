"""What the solvers that learn from the dense model share: Adam on what is left; zeros stay, and it never gets worse.

What learns: the kept weights and biases of the pruned sites, and the vectors of their blocks (norms). Adam in fp32, a
step a batch, the step size a fixed part of each parameter's root mean square, warmed up and let down along a cosine.
It takes memory for what learns four times over: the values before, the gradients, and Adam's two moments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zeroskip.calibrate import Block, Lesson, in_fp32, to_fp32
from zeroskip.errors import ZeroskipError
from zeroskip.model import Site
from zeroskip.prune.base import BlockSolver, Lessons

__all__ = ["Learner", "relative_error"]

JUDGES = 8  # batches on which before and after are compared


class Learner(BlockSolver):
    """A subclass sets its pace and its words, and writes `loss`.

    Attributes
    ----------
    step, vector_step : float
        The largest step of Adam: for a matrix a part of its root mean square, for a vector of its own, at least of one.
    passes, least : int
        Over all lessons; and at least so many steps.
    warm_up : int
        Steps in which the step size rises.
    verb, noun : str
        For the report: "tuned", "tuning".
    """

    step: ClassVar[float]
    vector_step: ClassVar[float]
    passes: ClassVar[int] = 1
    least: ClassVar[int] = 96
    warm_up: ClassVar[int]
    verb: ClassVar[str]
    noun: ClassVar[str]

    def loss(self, output: Any, lesson: Lesson) -> Tensor | None:
        """Return how far what the block returned is from what the lesson wants; None where shapes differ."""
        raise NotImplementedError

    def refine(
        self, block: Block, parts: Sequence[Block], sites: Sequence[Site], lessons: Lessons, draw: torch.Generator
    ) -> list[str]:
        if torch.is_inference_mode_enabled():
            raise ZeroskipError(f"'+{self.name}' needs gradients: call prune outside torch.inference_mode()")
        judges = lessons[:: max(1, len(lessons) // JUDGES)][:JUDGES]
        who = block.name or "the model"
        with in_fp32(block.module):
            learning = _learning(parts, sites)
            old = [(parameter, parameter.detach().clone()) for parameter in learning]
            before = self._judged(block, judges)
            if before is None:
                last = parts[-1].name or "it"
                return [f"{who}: not {self.verb}, because {last} is not called just once a forward"]
            self.descend(block, learning, lessons, draw)
            after = self._judged(block, judges)
            if after is None or not after < before:
                with torch.no_grad():
                    for parameter, value in old:
                        parameter.copy_(value)
                return [f"{who}: not {self.verb}, because its error rose from {before:.4f} to {after:.4f}"]
        return [f"{who}: {self.noun} took its error from {before:.4f} to {after:.4f}"]

    def descend(self, block: Block, learning: list[nn.Parameter], lessons: Lessons, draw: torch.Generator) -> None:
        """Take the steps."""
        zeros = [(parameter, parameter == 0) for parameter in learning if parameter.dim() > 1]
        groups = [{"params": [parameter], "lr": 0.0, "full": self._full(parameter)} for parameter in learning]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
        order: list[int] = []
        steps = max(self.least, self.passes * len(lessons))
        while len(order) < steps:
            order += torch.randperm(len(lessons), generator=draw).tolist()
        for parameter in learning:
            parameter.requires_grad_(True)
        for at, index in enumerate(order[:steps]):
            lesson = lessons[index]()
            if lesson is None:
                continue
            part = min(1.0, (at + 1) / self.warm_up) * (1 + math.cos(math.pi * at / steps)) / 2
            for group in adam.param_groups:
                group["lr"] = group["full"] * part
            adam.zero_grad()
            with torch.enable_grad():
                self._lost(block, lesson).backward()  # type: ignore[no-untyped-call]
            for parameter, zero in zeros:
                if parameter.grad is not None:
                    parameter.grad.masked_fill_(zero, 0.0)  # Adam then leaves them alone
            adam.step()

    def _full(self, parameter: Tensor) -> float:
        size = math.sqrt(float(parameter.detach().square().sum()) / max(1, int((parameter != 0).sum())))
        return self.step * size if parameter.dim() > 1 else self.vector_step * max(size, 1.0)

    def _lost(self, block: Block, lesson: Lesson) -> Tensor:
        args, kwargs = pytree.tree_map(to_fp32, (lesson.args, dict(lesson.kwargs)))
        loss = self.loss(block.module(*args, **kwargs), lesson)
        if loss is None:
            raise ZeroskipError(
                f"{block.name or 'the model'}: returns another shape than when dense; leave '+{self.name}' out"
            )
        return loss

    @torch.no_grad()
    def _judged(self, block: Block, judges: Lessons) -> float | None:
        given = [lesson for judge in judges if (lesson := judge()) is not None]
        return sum(float(self._lost(block, lesson)) for lesson in given) / len(given) if given else None


def _learning(parts: Sequence[Block], sites: Sequence[Site]) -> list[nn.Parameter]:
    """The weights and biases of the pruned sites and every vector of the parts, each once, in module order."""
    pruned = {id(parameter) for site in sites for parameter in site.module.parameters()}
    every = {id(each): each for part in parts for each in part.module.parameters()}
    return [each for key, each in every.items() if key in pruned or each.dim() == 1]


def relative_error(output: Tensor, target: Tensor, visible: Tensor | None) -> Tensor:
    """Return |y - t|^2 / |t|^2, mean over the tokens that are visible; [..., features], fp32."""
    lost, size = (output - target).square().sum(-1), target.square().sum(-1)
    if visible is not None:
        lost, size = lost[visible], size[visible]
    return (lost / size.clamp_min(1e-12)).mean()

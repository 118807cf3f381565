"""Where a decode step goes, as data and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zeroskip.planning.report import table

__all__ = ["PROFILE_LEGEND", "StepProfile", "profile_table"]

PROFILE_LEGEND = (
    "step: one decode step of one sequence, median; kernels: all products, ours and torch's; attention: ours, and "
    "torch's scaled_dot_product_attention; x: step over kernels and attention",
    "generate: a token of `generate`, choosing it included; x over the same kernels and attention",
    "compiled: the same model under torch.compile with a static cache; x over the same kernels and attention",
)


@dataclass(frozen=True)
class StepProfile:
    """Milliseconds of one decode step, medians.

    Attributes
    ----------
    model : str
    tokens, threads : int
        Before the step; torch's threads.
    step_ms, kernels_ms, attention_ms : float
    calls : int
        Products of a step.
    generate_ms : float
        From one token of `generate` to the next: choosing it, and looking whether to stop, are in it.
    compiled_ms : float or None
        Under torch.compile with a static cache; None where that was not asked for.
    compiled_problem : str or None
        Why it did not run.
    """

    model: str
    tokens: int
    threads: int
    step_ms: float
    kernels_ms: float
    attention_ms: float
    calls: int
    generate_ms: float
    compiled_ms: float | None = None
    compiled_problem: str | None = None

    @property
    def rest_ms(self) -> float:
        return self.step_ms - self.kernels_ms - self.attention_ms

    @property
    def over(self) -> float:
        """How many times the kernels and attention the step takes."""
        return self.step_ms / (self.kernels_ms + self.attention_ms)


def profile_table(profiles: Sequence[StepProfile]) -> list[str]:
    """Return the lines of a table."""
    header = ["model", "tokens", "threads", "step ms", "kernels", "attention", "rest", "products", "x"]
    header += ["generate ms", "x", "compiled ms", "x"]
    rows = []
    for one in profiles:
        both = one.kernels_ms + one.attention_ms
        last = [one.compiled_problem or "-", "-"]
        if one.compiled_ms is not None:
            last = [f"{one.compiled_ms:.2f}", f"{one.compiled_ms / both:.2f}"]
        times = [f"{value:.2f}" for value in (one.step_ms, one.kernels_ms, one.attention_ms, one.rest_ms)]
        generated = [f"{one.generate_ms:.2f}", f"{one.generate_ms / both:.2f}"]
        counts = [one.model, str(one.tokens), str(one.threads)]
        rows.append([*counts, *times, str(one.calls), f"{one.over:.2f}", *generated, *last])
    return table(header, rows)

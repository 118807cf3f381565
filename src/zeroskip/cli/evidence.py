"""What `zeroskip prune` measures beside pruning: perplexity before and after, and whether the zeros pay here."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroskip.cli.terminal import progress
from zeroskip.errors import ZeroskipError

if TYPE_CHECKING:
    from torch import nn

    from zeroskip.prune import Report
    from zeroskip.quality import Judge

__all__ = ["Evidence"]


class Evidence:
    """Measures, and writes into the report.

    Raises
    ------
    ZeroskipError
        If a text is given that this model cannot be scored on. What fails later is said in the report; it does not end
        a run that has pruned for hours.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Any,
        text: Path | None,
        eval_text: Path | None,
        eval_context: int | None,
        seed: int,
        quality: bool,
        speed: bool,
    ) -> None:
        from zeroskip.cli.models import is_causal_lm
        from zeroskip.quality import Judge

        self.speed = speed
        self.judge: Judge | None = None
        self.found: dict[str, Any] = {}
        causal = is_causal_lm(network)
        if eval_text is not None and not causal:
            raise ZeroskipError(f"--eval-text {eval_text}: a {type(network).__name__} is no causal language model")
        if eval_context is not None and eval_text is None:
            raise ZeroskipError("--eval-context says how --eval-text is cut: give --eval-text FILE, or leave it out")
        if eval_text is not None:
            self.judge = Judge.of_text(network, tokenizer, eval_text, eval_context)
        elif quality and causal and text is not None:
            self.judge = Judge.of_calibration(network, tokenizer, text, seed)

    def before(self, network: nn.Module) -> None:
        """Score the dense model."""
        if self.judge is not None:
            self.found = _scored(self.judge, network, "perplexity before")

    def after(self, network: nn.Module, report: Report) -> None:
        """Score the pruned one, and time its layers."""
        if self.judge is not None:
            report.quality = {"about": self.judge.about, "before": self.found}
            try:
                report.quality["after"] = _scored(self.judge, network, "perplexity after")
            except ZeroskipError as error:
                report.quality["problem"] = str(error)
        if self.speed:
            report.speed = _speed(network)


def _scored(judge: Judge, network: nn.Module, what: str) -> dict[str, Any]:
    """Score in fp32, as `zeroskip eval` does, without a second model in memory."""
    from zeroskip.calibrate import in_fp32_by_parts
    from zeroskip.planning.install import compiled_layers

    compiled = next(compiled_layers(network), None) is not None
    with progress(what) as advance, nullcontext() if compiled else in_fp32_by_parts(network):
        found = judge.score(network, advance).to_dict()
    return found if compiled else found | {"dtype": "float32"}


def _speed(network: nn.Module) -> dict[str, Any]:
    from zeroskip.analyze import analyze

    try:
        with progress("measuring speed") as advance:
            found = analyze(network, progress=advance)
    except ZeroskipError as error:
        return {"advice": f"not measured: {error}", "gains": {}, "machine": ""}
    return {
        "advice": found.advice,
        "gains": {str(t): gain for t, gain in found.gains.items()},
        "machine": str(found.machine),
    }

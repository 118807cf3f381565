"""Perplexity before and after a change, on windows that are chosen once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.calibrate import drawn_windows, strings_of, token_stream, window_limit
from zeroskip.quality.perplexity import Perplexity, score, sizes, windows

__all__ = ["Judge"]

WINDOW = 512  # tokens, as calibration cuts them
MOST = 32  # windows of the calibration text; of a text of its own all are scored


@dataclass(frozen=True, eq=False)
class Judge:
    """Windows [windows, tokens] of a text, and a line that says which text they are."""

    windows: Tensor
    about: str

    @staticmethod
    def of_text(model: nn.Module, tokenizer: Any, text: str | os.PathLike[str], context: int | None = None) -> Judge:
        """Take all of a text in windows of `context` tokens, by default 512 or what the model allows."""
        limit = window_limit(model, tokenizer)
        size, _ = sizes(int(min(WINDOW, limit)) if context is None else context, None, limit)
        cut = windows(token_stream(strings_of(text), tokenizer), size, size)
        return Judge(cut, f"all of {Path(text).name}")

    @staticmethod
    def of_calibration(model: nn.Module, tokenizer: Any, text: str | os.PathLike[str], seed: int) -> Judge:
        """Take windows of the calibration text that did not calibrate, evenly spread; where there are none, those
        that did."""
        (used, left), name = drawn_windows(model, text, tokenizer, seed), Path(text).name
        rows = left or used
        rows = [rows[at * len(rows) // min(MOST, len(rows))] for at in range(min(MOST, len(rows)))]
        what = (
            "that did not calibrate, next to some that did"
            if left
            else "that calibrated, for it has none to spare: this flatters"
        )
        return Judge(torch.tensor(rows), f"{len(rows)} windows of {name} {what}")

    def score(self, model: nn.Module, progress: Callable[[int, int, str], None] | None = None) -> Perplexity:
        """Score the windows."""
        size = self.windows.shape[1]
        return score(model, self.windows, size, size, progress)

"""An encoder that turns texts into vectors, one call at a time."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zeroskip.errors import ZeroskipError

__all__ = ["Embedder", "TooLong"]

BATCH = 32


class TooLong(ValueError):
    """An input has more tokens than the encoder takes."""


class Embedder:
    """Mean-pooled (or, where the model's sentence-transformers files say so, first-token) vectors of length one.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        An encoder whose first output is [batch, tokens, hidden].
    tokenizer : transformers tokenizer
    directory : path
        Where they are from.
    """

    def __init__(self, model: Any, tokenizer: Any, directory: Path) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.first_token = _pools_first_token(directory)
        config = model.config.get_text_config()
        known = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
        self.longest = min(int(length) for length in known if length)
        self.waiting = 0
        self._one_at_a_time = threading.Lock()
        self(self.tokens(["a"]))

    def tokens(self, texts: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
        """Return the tokens of each text; what is tokens already stays as it is.

        Raises
        ------
        TooLong
            Naming the length and the limit.
        """
        rows = [list(text) if not isinstance(text, str) else self.tokenizer(text)["input_ids"] for text in texts]
        for row in rows:
            if len(row) > self.longest:
                raise TooLong(f"this model takes {self.longest} tokens, but an input has {len(row)}")
        return rows

    def __call__(self, rows: Sequence[list[int]]) -> Tensor:
        """Return fp32 [rows, hidden] for rows of tokens."""
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))  # a batch holds rows of like length
        out: list[Tensor] = [torch.empty(0)] * len(rows)
        with self._one_at_a_time, torch.inference_mode():
            for at in range(0, len(rows), BATCH):
                places = order[at : at + BATCH]
                batch = self.tokenizer.pad({"input_ids": [rows[place] for place in places]}, return_tensors="pt")
                for place, vector in zip(places, self._vectors(batch), strict=True):
                    out[place] = vector
        return torch.stack(out)

    def _vectors(self, batch: Any) -> Tensor:
        hidden = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0].float()
        if self.first_token:
            pooled = hidden[:, 0]
        else:
            mask = batch["attention_mask"].unsqueeze(-1).float()
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(pooled, dim=-1)


def _pools_first_token(directory: Path) -> bool:
    """Return what sentence-transformers' files say of pooling: the first token, or (also without files) the mean."""
    path = directory / "1_Pooling" / "config.json"
    if not path.is_file():
        return False
    told = json.loads(path.read_text(encoding="utf-8"))
    modes = {name for name, on in told.items() if name.startswith("pooling_mode_") and on is True}
    if not modes <= {"pooling_mode_mean_tokens", "pooling_mode_cls_token"} or len(modes) > 1:
        raise ZeroskipError(f"{path}: pools by {', '.join(sorted(modes))}; the mean and the first token are served")
    return modes == {"pooling_mode_cls_token"}

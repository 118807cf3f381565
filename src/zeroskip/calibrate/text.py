"""Calibration batches from text: the convenience form of `calibration=`."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from zeroskip.errors import ZeroskipError

__all__ = ["drawn_windows", "strings_of", "text_batches", "token_stream", "window_limit"]

ROWS = 128  # sequences at most: the sample of the papers; more changes little
BATCH = 8


def text_batches(
    model: nn.Module, text: str | os.PathLike[str] | Iterable[str], tokenizer: Any, seed: int = 0, tokens: int = 512
) -> list[dict[str, Tensor]]:
    """Cut text into calibration batches.

    A tokenizer with a [CLS] token belongs to an encoder: every string is one row, cut to the window and padded (with
    its attention mask) among rows of like length. Otherwise the strings, each followed by the end-of-text token, are
    joined and cut into rows of exactly one window; the rest is dropped unless there is no other row. Of more than 128
    rows, 128 are drawn by `seed`. Rows go in batches of 8.

    Parameters
    ----------
    model : nn.Module
        Its config bounds the window.
    text : list of str, or path
        Strings, or a file that `strings_of` reads (a string that names one counts).
    tokenizer
        A transformers tokenizer.
    seed : int
    tokens : int
        The window, made smaller where model or tokenizer allow less.

    Raises
    ------
    ZeroskipError
        If there is no text, the tokenizer is missing, or the model has an encoder and a decoder.
    """
    if tokenizer is None:
        raise ZeroskipError("text= needs tokenizer=, the model's own")
    if not callable(tokenizer):
        raise ZeroskipError(f"tokenizer is a {type(tokenizer).__name__}: give the model's own, as loaded")
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ZeroskipError(
            f"text= serves causal language models and encoders, and a {type(model).__name__} is an "
            "encoder-decoder: give calibration= batches"
        )
    if _is_encoder(tokenizer):
        limit = int(min(tokens, window_limit(model, tokenizer)))
        strings = strings_of(text, paragraphs=True)
        rows = [tokenizer(string, truncation=True, max_length=limit)["input_ids"] for string in strings]
        rows = sorted((rows[at] for at in _drawn(len(rows), seed)), key=len)
        return [_padded(rows[at : at + BATCH], tokenizer.pad_token_id or 0) for at in range(0, len(rows), BATCH)]
    rows, _ = drawn_windows(model, text, tokenizer, seed, tokens)
    return [{"input_ids": torch.tensor(rows[at : at + BATCH])} for at in range(0, len(rows), BATCH)]


def drawn_windows(
    model: nn.Module, text: str | os.PathLike[str] | Iterable[str], tokenizer: Any, seed: int = 0, tokens: int = 512
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the windows of a text that `text_batches`, called alike for a decoder, takes, and those it leaves."""
    tokens = int(min(tokens, window_limit(model, tokenizer)))
    stream = token_stream(strings_of(text), tokenizer)
    rows = [stream[at : at + tokens] for at in range(0, len(stream) - tokens + 1, tokens)] or [stream]
    drawn = _drawn(len(rows), seed)
    left = sorted(set(range(len(rows))) - set(drawn))
    return [rows[at] for at in drawn], [rows[at] for at in left]


def _is_encoder(tokenizer: Any) -> bool:
    return getattr(tokenizer, "cls_token_id", None) is not None


def window_limit(model: nn.Module, tokenizer: Any) -> float:
    """Return how many tokens one sequence may have, by the model's config and its tokenizer; infinity where neither
    says."""
    config = getattr(model, "config", None)
    limits = (getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None))
    return min((int(limit) for limit in limits if limit), default=math.inf)


def token_stream(strings: Iterable[str], tokenizer: Any) -> list[int]:
    """Return the ids of all strings, joined; the end-of-text token, where the tokenizer has one, follows each."""
    end = [tokenizer.eos_token_id] if getattr(tokenizer, "eos_token_id", None) is not None else []
    return [token for string in strings for token in [*tokenizer(string, verbose=False)["input_ids"], *end]]


def strings_of(text: str | os.PathLike[str] | Iterable[str], paragraphs: bool = False) -> list[str]:
    """Return the strings of a text that hold more than blanks.

    Parameters
    ----------
    text : list of str, or path
        Strings; or a file (a string that names one counts): UTF-8 text, or with a name that ends with .json a list of
        strings. Either may be compressed, with .gz at the end of the name.
    paragraphs : bool
        Whether each paragraph of a text file is a string, or the file one.

    Raises
    ------
    ZeroskipError
        If there is none, or the file cannot be read.
    """
    if not isinstance(text, str | os.PathLike | Iterable):
        raise ZeroskipError(f"text= is a {type(text).__name__}: give a list of strings or a path")
    path = Path(text) if isinstance(text, str | os.PathLike) else None
    strings = _read(path, paragraphs) if path is not None else list(cast(Iterable[str], text))
    if any(not isinstance(string, str) for string in strings):
        raise ZeroskipError("text= holds something that is no string: give a list of strings or a path")
    strings = [string for string in strings if string.strip()]
    if not strings:
        raise ZeroskipError("text= holds no text" if path is None else f"text= {str(path)[:80]!r} holds no text")
    return strings


def _read(path: Path, paragraphs: bool) -> list[str]:
    try:
        raw = path.read_bytes()
        name = path.name.removesuffix(".gz")
        content = (gzip.decompress(raw) if name != path.name else raw).decode("utf-8")
        if not name.endswith(".json"):
            return re.split(r"\n\s*\n", content) if paragraphs else [content]
        strings = json.loads(content)
    except (OSError, ValueError, EOFError, RecursionError, zlib.error) as error:
        advice = "" if path.is_file() else "; give a list of strings"  # or a sentence was given in place of its list
        raise ZeroskipError(f"text= {str(path)[:80]!r} is no readable UTF-8 file ({error}){advice}") from None
    if not isinstance(strings, list):
        raise ZeroskipError(f"text= {str(path)[:80]!r} holds a JSON {type(strings).__name__}, not a list of strings")
    return strings


def _drawn(count: int, seed: int) -> list[int]:
    """Which of `count` rows calibrate, in order."""
    if count <= ROWS:
        return list(range(count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:ROWS]
    return [int(index) for index in order.sort().values]


def _padded(rows: list[list[int]], pad: int) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}

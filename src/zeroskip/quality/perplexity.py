"""Perplexity: e to the mean negative log-likelihood that a causal language model gives to the tokens of a text.

All strings of the text, each followed by the end-of-text token, are joined and cut into windows of `context` tokens
that begin every `stride` tokens. A window scores the tokens that no window before it has scored, and never its first,
which has nothing before it. What is left at the end and fills no window is not scored, unless there is no other window.
"""

from __future__ import annotations

import inspect
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.calibrate import strings_of, token_stream, window_limit
from zeroskip.errors import ZeroskipError, first_line

__all__ = ["Perplexity", "perplexity", "score", "sizes", "windows"]

CONTEXT = 2048  # where neither the caller nor the model says less
LOGITS = 1 << 25  # numbers that one call may return: the batch is as large as that allows, up to
BATCH = 8
PROBE = 16  # tokens on which a model shows that it does not look ahead


@dataclass(frozen=True)
class Perplexity:
    """What was measured; `str` gives one line.

    Attributes
    ----------
    value : float
        e^nll, infinity where that overflows.
    nll : float
        Mean negative log-likelihood of a scored token, in nats.
    tokens, windows : int
        How many were scored.
    context, stride : int
        In tokens.
    dtype : str
        Of the model's floating-point parameters.
    seconds : float
    """

    value: float
    nll: float
    tokens: int
    windows: int
    context: int
    stride: int
    dtype: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; an infinite `value` becomes None."""
        return asdict(self) | {"value": self.value if math.isfinite(self.value) else None}

    def __str__(self) -> str:
        return (
            f"perplexity {self.value:.2f} over {self.tokens:,} tokens in {self.windows} windows of {self.context}, "
            f"one every {self.stride}, {self.dtype}, {self.seconds:.1f} s"
        )


def perplexity(
    model: nn.Module,
    text: str | os.PathLike[str] | Iterable[str],
    tokenizer: Any,
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Perplexity:
    """Score a text with a causal language model, as the head of this file says.

    Parameters
    ----------
    model : nn.Module
        Runs as it is, in its own dtype and in evaluation mode; not modified. Log-likelihoods are taken in fp32 and
        summed in fp64.
    text : list of str, or path
        See `zeroskip.calibrate.strings_of`.
    tokenizer
        The model's own, as transformers makes it.
    context : int, optional
        Tokens of a window. Default: what model and tokenizer allow, at most 2,048.
    stride : int, optional
        Default: `context`, so that windows do not overlap.
    progress : function (windows done, windows in all, ""), optional

    Raises
    ------
    ZeroskipError
        If the text holds less than two tokens, the model is not causal, `context` is more than it can take, the
        tokenizer is missing or of another model, or the model returns NaN.

    Source: sliding windows as transformers' documentation describes them for models of fixed length.
    """
    if tokenizer is None:
        raise ZeroskipError("perplexity needs the model's tokenizer: pass tokenizer=")
    context, stride = sizes(context, stride, window_limit(model, tokenizer))
    cut = windows(token_stream(strings_of(text), tokenizer), context, stride)
    return score(model, cut, context, stride, progress)


@torch.no_grad()
def score(
    model: nn.Module,
    cut: Tensor,
    context: int,
    stride: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> Perplexity:
    """As `perplexity`, of windows [windows, tokens] that are already cut."""
    started = time.perf_counter()
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ZeroskipError(f"a {type(model).__name__} has an encoder and a decoder: perplexity is of causal models")
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        width = _check_causal(model, cut[0])
        batch = max(1, min(BATCH, LOGITS // (cut.shape[1] * width)))
        total, scored = 0.0, 0
        for done in range(0, len(cut), batch):
            ids = cut[done : done + batch]
            losses = _losses(model, ids)
            first = [1 if done + row == 0 else max(1, context - stride) for row in range(len(ids))]
            new = torch.arange(1, cut.shape[1]) >= torch.tensor(first).unsqueeze(1)
            total += float(losses[new].sum())
            scored += int(new.sum())
            if math.isnan(total):
                raise ZeroskipError(f"the model returns NaN on tokens {done * stride} and following: it is broken")
            if progress is not None:
                progress(done + len(ids), len(cut), "")
    finally:
        for module in training:
            module.training = True
    nll = total / scored
    value = math.exp(nll) if nll < 700 else math.inf
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    dtype = ", ".join(sorted({str(each).removeprefix("torch.") for each in floats}))
    return Perplexity(value, nll, scored, len(cut), context, stride, dtype, time.perf_counter() - started)


def windows(stream: list[int], context: int, stride: int) -> Tensor:
    """Return [windows, context] int64 token ids, a window every `stride` tokens; one shorter window if none is full."""
    if len(stream) < 2:
        raise ZeroskipError(f"the text has {len(stream)} tokens: perplexity needs at least 2")
    ids = torch.tensor(stream)
    return ids.unfold(0, context, stride) if len(stream) >= context else ids.unsqueeze(0)


def sizes(context: int | None, stride: int | None, limit: float) -> tuple[int, int]:
    """Return context and stride in tokens, checked, and with their defaults."""
    for name, value in (("context", context), ("stride", stride)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ZeroskipError(f"{name} is {value!r}: give a whole number of tokens")
    context = int(min(CONTEXT, limit)) if context is None else context
    if not 2 <= context <= limit:
        most = "2 or more" if limit == math.inf else f"2 to {limit:.0f}, which is the model's limit"
        raise ZeroskipError(f"context is {context}: give {most}")
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ZeroskipError(f"stride is {stride}: give 1 to {context}, the context, or tokens are left out")
    return context, stride


def _check_causal(model: nn.Module, ids: Tensor) -> int:
    """Return the number of logits of a token, after seeing that they do not depend on the tokens that follow."""
    ids = ids[:PROBE].unsqueeze(0)
    other = ids.clone()
    other[0, -1] = ids[0, -1] - 1 if ids[0, -1] else 1
    logits = _logits(model, ids)
    moved = (_logits(model, other) - logits)[0].abs().float()
    if float(moved[:-1].max()) > 1e-4 * float(moved[-1].max()):
        raise ZeroskipError(
            f"a {type(model).__name__} looks ahead: its logits depend on the tokens that follow, and perplexity is of "
            "causal models"
        )
    return logits.shape[-1]


def _losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Return [rows, tokens - 1] fp64: the negative log-likelihood of each token but the first."""
    logits = _logits(model, ids)[:, :-1]
    targets = ids[:, 1:].to(logits.device)
    lost = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return lost.view(targets.shape).double().cpu()


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Run the model on [rows, tokens] ids and return [rows, tokens, vocabulary]."""
    takes = inspect.signature(model.forward).parameters
    more = {"use_cache": False} if "use_cache" in takes else {}
    ids = ids.to(next((parameter.device for parameter in model.parameters()), "cpu"))
    try:
        output = model(input_ids=ids, **more) if "input_ids" in takes else model(ids)
    except IndexError as error:
        raise ZeroskipError(
            f"the model does not know token {int(ids.max())} ({first_line(error)}): is the tokenizer its own?"
        ) from error
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        raise ZeroskipError(f"a {type(model).__name__} gives no logits for every token: perplexity is of causal models")
    if int(ids.max()) >= logits.shape[-1]:
        raise ZeroskipError(
            f"token {int(ids.max())} has no logit, the model has {logits.shape[-1]}: is the tokenizer its own?"
        )
    return logits

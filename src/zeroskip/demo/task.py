"""The demo's task: the first paragraph of a docstring must find the rest of it among a thousand others.

A sentence is the mean of its tokens' last hidden states (padding masked out), scaled to length one; the score of a
document is its cosine with the query. Recall@k is the share of queries whose own document is among the k best.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zeroskip.demo.data import Pair

MAX_TOKENS = 128
Z95 = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Recall:
    """Which queries found their document first, and which among the first ten."""

    ranks: tuple[int, ...]

    def at(self, k: int) -> float:
        """Share of queries whose document is among the k best."""
        return sum(rank < k for rank in self.ranks) / len(self.ranks)

    def interval(self, k: int) -> tuple[float, float]:
        """Wilson 95 % interval of `at(k)`.

        Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
        """
        n, p = len(self.ranks), self.at(k)
        centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def kept(self, dense: Recall, k: int, *, seed: int = 0, rounds: int = 1000) -> tuple[float, float, float]:
        """Share of the dense recall that is kept, with its 95 % interval from a bootstrap over the paired queries."""
        ours = [rank < k for rank in self.ranks]
        theirs = [rank < k for rank in dense.ranks]
        rng = random.Random(seed)
        drawn = []
        for _ in range(rounds):
            take = rng.choices(range(len(ours)), k=len(ours))
            drawn.append(sum(ours[i] for i in take) / max(1, sum(theirs[i] for i in take)))
        drawn.sort()
        return sum(ours) / max(1, sum(theirs)), drawn[int(0.025 * rounds)], drawn[int(0.975 * rounds)]

    def to_dict(self) -> dict[str, Any]:
        """Figures for the JSON file."""
        return {
            "queries": len(self.ranks),
            **{f"recall_at_{k}": {"value": self.at(k), "interval": list(self.interval(k))} for k in (1, 10)},
        }


def tokenized(
    tokenizer: Any, texts: Sequence[str], *, batch_size: int = 64, max_tokens: int = MAX_TOKENS
) -> list[dict[str, torch.Tensor]]:
    """Cut `texts` into padded batches, the longest first, so that a batch holds texts of like length."""
    rows = _longest_first(texts)
    takes = [[texts[i] for i in rows[at : at + batch_size]] for at in range(0, len(rows), batch_size)]
    asked = {"padding": True, "truncation": True, "max_length": max_tokens, "return_tensors": "pt"}
    return [dict(tokenizer(take, **asked)) for take in takes]


def _longest_first(texts: Sequence[str]) -> list[int]:
    return sorted(range(len(texts)), key=lambda i: -len(texts[i]))


def embed(
    model: torch.nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_tokens: int = MAX_TOKENS,
    advance: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    """Embed `texts`: fp32 [len(texts), hidden], rows of length one, in the order given.

    `advance` is told how many texts each batch finished.
    """
    rows = _longest_first(texts)
    out: torch.Tensor | None = None
    with torch.inference_mode():
        for at, batch in enumerate(tokenized(tokenizer, texts, batch_size=batch_size, max_tokens=max_tokens)):
            take = rows[at * batch_size : (at + 1) * batch_size]
            hidden = model(**batch)[0].float()
            mask = batch["attention_mask"].unsqueeze(-1).float()
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            unit = torch.nn.functional.normalize(mean, dim=-1)
            if out is None:
                out = torch.empty(len(texts), unit.shape[-1])
            out[take] = unit
            advance(len(take))
    return torch.empty(0, 0) if out is None else out


def recall(
    model: torch.nn.Module, tokenizer: Any, pairs: Sequence[Pair], *, advance: Callable[[int], None] = lambda _: None
) -> Recall:
    """Run the task: each pair's query against the documents of all pairs.

    A document that scores as high as the right one, or a score that is NaN, ranks before it: a broken model that maps
    everything to one point finds nothing.
    """
    queries = embed(model, tokenizer, [pair.query for pair in pairs], advance=advance)
    documents = embed(model, tokenizer, [pair.document for pair in pairs], advance=advance)
    scores = queries @ documents.T
    own = scores.diagonal().unsqueeze(1)
    ranks = (~(scores < own)).sum(1) - 1
    return Recall(tuple(ranks.tolist()))

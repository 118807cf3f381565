"""What is benchmarked: layers of known models and a grid, with zeros chosen as pruning would choose them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from zeroskip.errors import ZeroskipError, suggest
from zeroskip.prune.patterns import Pattern

__all__ = ["SUITES", "Case", "Suite", "Transformer", "Zeros", "suite"]


@dataclass(frozen=True)
class Transformer:
    """The linear layers of one model: every block has the same."""

    name: str
    blocks: int
    hidden: int
    queries: int  # outputs of the query projection: heads times the size of a head
    keys: int  # of the key and of the value projection
    ffn: int
    gated: bool = True

    def layers(self) -> Counter[tuple[int, int]]:
        """How often each shape (m, k) occurs in the model; embeddings and the language model's head left out."""
        found: Counter[tuple[int, int]] = Counter()
        up = 2 if self.gated else 1
        block = [((self.queries, self.hidden), 1), ((self.keys, self.hidden), 2), ((self.hidden, self.queries), 1)]
        for shape, count in [*block, ((self.ffn, self.hidden), up), ((self.hidden, self.ffn), 1)]:
            found[shape] += count * self.blocks
        return found


DISTINCT_ROWS = 1024  # a multiple of every strip


@dataclass(frozen=True)
class Zeros:
    """A pattern (`zeroskip.prune.patterns`) and the fraction of zeros, which N:M patterns fix themselves."""

    pattern: str
    sparsity: float


@dataclass(frozen=True)
class Case:
    """A weight [m, k] of a model whose linear layers have `parameters` weights in all."""

    model: str
    m: int
    k: int
    zeros: Zeros
    parameters: int

    def __str__(self) -> str:
        return f"{self.model} {self.m}x{self.k} {self.zeros.pattern} {self.zeros.sparsity:.0%}"

    def norms(self) -> Tensor:
        """fp32 [k]: the norm of each input over the tokens; log-normal, one in a hundred far larger.

        In language models a few channels carry activations tens of times larger than the others; they decide which
        weights a score such as Wanda's keeps.
        """
        generator = torch.Generator().manual_seed(self.k)
        norms = torch.exp(0.5 * torch.randn(self.k, generator=generator))
        far = torch.rand(self.k, generator=generator) < 0.01
        return torch.where(far, norms * 20, norms)

    def weight(self) -> Tensor:
        """fp32 [m, k], exact in bf16, the same numbers each time; zeros where |w| times the input's norm is lowest.

        Rows differ in scale (log-normal), as those of trained layers do. Unstructured zeros are chosen row by row.
        Beyond DISTINCT_ROWS they repeat, which no kernel knows and which saves most of the time to make them.
        """
        generator = torch.Generator().manual_seed(self.m * 31 + self.k)
        distinct = min(self.m, DISTINCT_ROWS)
        rows = torch.exp(0.3 * torch.randn(distinct, 1, generator=generator)) / self.k**0.5
        dense = (torch.randn(distinct, self.k, generator=generator) * rows).bfloat16().float()
        return self._pruned(dense).repeat(-(-self.m // distinct), 1)[: self.m].contiguous()

    def _pruned(self, dense: Tensor) -> Tensor:
        score = dense.abs() * self.norms()
        pattern = Pattern.parse(self.zeros.pattern)
        if pattern.name == "unstructured":  # the plain threshold of each row: much faster
            limit = score.kthvalue(max(1, round(self.k * self.zeros.sparsity)), dim=1, keepdim=True).values
            return torch.where(score > limit, dense, 0.0)
        return torch.where(pattern.select(score, self.zeros.sparsity), dense, 0.0)

    def activations(self, tokens: int) -> Tensor:
        """fp32 [tokens, k], with the norms that chose the zeros."""
        generator = torch.Generator().manual_seed(tokens)
        return torch.randn(tokens, self.k, generator=generator) * self.norms()


@dataclass(frozen=True)
class Suite:
    """Cases in the order in which they are run; where time is short the first ones stand for all.

    Attributes
    ----------
    tokens : tuple of int
        Token counts.
    """

    name: str
    about: str
    cases: tuple[Case, ...]
    tokens: tuple[int, ...]


HALF = Zeros("unstructured", 0.5)
STRIP = Zeros("8:16@64", 0.5)
PRUNED = (HALF, STRIP, Zeros("unstructured", 0.7), Zeros("1:4@64", 0.75), Zeros("2:4@64", 0.5))
LLAMA_1B = Transformer("Llama 1.1B", 16, 2048, 2048, 512, 8192)
LLAMA_8B = Transformer("Llama-3 8B", 32, 4096, 4096, 1024, 14336)
QWEN_4B = Transformer("Qwen3 4B", 36, 2560, 4096, 1024, 9728)
MINILM = Transformer("MiniLM-L6", 6, 384, 384, 384, 1536, gated=False)
BERT = Transformer("BERT-base", 12, 768, 768, 768, 3072, gated=False)
SIDES = (2048, 4096, 1024)
GRID = (
    HALF,
    STRIP,
    Zeros("unstructured", 0.7),
    Zeros("1:4@64", 0.75),
    Zeros("unstructured", 0.9),
    Zeros("2:4@64", 0.5),
)


def _cases(models: tuple[Transformer, ...]) -> Iterator[Case]:
    """First the shape that holds most weights of each model, then the next; the first two kinds of zeros before all
    others, so that a run that is cut short has seen every model, a free and a strip pattern."""
    ranked = []
    for model in models:
        layers = model.layers()
        total = sum(m * k * count for (m, k), count in layers.items())
        for rank, (m, k) in enumerate(sorted(layers, key=lambda shape: -layers[shape] * shape[0] * shape[1])):
            ranked.append((rank, model.name, m, k, total))
    for kinds in (PRUNED[:2], PRUNED[2:]):
        for _, name, m, k, total in sorted(ranked, key=lambda entry: entry[0]):
            yield from (Case(name, m, k, zeros, total) for zeros in kinds)


def _grid() -> Iterator[Case]:
    """Squares, each as the only kind of layer of a model that no cache holds; every kind of zeros before the next side,
    so that a run that is cut short has seen where sparse layouts begin to win."""
    for side in SIDES:
        for zeros in GRID:
            yield Case("grid", side, side, zeros, 1 << 28)


SUITES = {
    suite.name: suite
    for suite in (
        Suite("llm", "Llama 1.1B, Llama-3 8B, Qwen3 4B", tuple(_cases((LLAMA_1B, LLAMA_8B, QWEN_4B))), (1, 16, 128)),
        Suite("encoder", "MiniLM-L6, BERT-base", tuple(_cases((MINILM, BERT))), (32, 128, 512)),
        Suite("synthetic", "squares of 1024, 2048 and 4096", tuple(_grid()), (1, 8, 32, 128, 512)),
    )
}


def suite(name: str) -> Suite:
    """The suite of this name; an unknown one raises ZeroskipError."""
    if name not in SUITES:
        raise ZeroskipError(f"unknown suite {name!r}{suggest(name, SUITES)}")
    return SUITES[name]

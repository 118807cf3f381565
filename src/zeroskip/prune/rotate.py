"""Turn the values of attention heads so that their outputs can be pruned: the function stays, the weights change.

Between the value projection V and the output projection O a head does nothing but average its inputs, so any
invertible T may be put there: (O T^-1)(T V) = O V. With c the averaged values of a head, C = E[c c^T] = L L^T and

    O L = U S Z^T,    T = U^T O,    O <- U,    V <- U^T O V,

the columns of the new O have length one and its inputs the energies S^2: as few inputs as can be carry as much of the
head's output as can be. Where key-value heads are shared, the O of all heads that share one are stacked. The inputs
are dealt out like cards, the strongest first, so that every group of an N:M pattern gets strong and weak ones.

Which layers are V and O is found by trying: two layers whose sizes fit, the one called before the other, are V and O
if the block's output stays what it was when a random T is put between them, and does not when V alone gets it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zeroskip.calibrate import Block, Replay, collect, first_tensor, in_fp32, to_fp32
from zeroskip.errors import ZeroskipError
from zeroskip.model import Site
from zeroskip.prune.numerics import cholesky
from zeroskip.prune.patterns import NM, Pattern

__all__ = ["Heads", "Pair", "find_pairs", "rotate", "turn"]

log = logging.getLogger(__name__)

SAME = 1e-4  # |change of the block's output| / |output| that rounding in fp32 explains
RIDGE = 1e-4
BATCHES = 32  # are enough for C
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Heads:
    """How the attention of a model is divided: V makes `shared` heads, O reads `heads` of the same width."""

    heads: int
    shared: int

    @staticmethod
    def of(config: Any) -> Heads | None:
        """Read them from a transformers config; None where it names none."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = getattr(text, "num_attention_heads", None)
        if not isinstance(heads, int) or heads < 1:
            return None
        shared = getattr(text, "num_key_value_heads", None) or heads
        return Heads(heads, shared) if heads % shared == 0 else None

    def join(self, value: Site, output: Site) -> bool:
        """Whether V and O have shapes that fit, and O more outputs than a head has inputs."""
        if value.shape[0] != 1 or output.shape[0] != 1 or value.shape[1] % self.shared:
            return False
        width, repeats = value.shape[1] // self.shared, self.heads // self.shared
        return output.shape[2] == self.heads * width and output.shape[1] * repeats >= width


@dataclass(frozen=True)
class Pair:
    """V [shared * width, k] and O [m, heads * width] of one attention."""

    value: Site
    output: Site
    heads: Heads

    @property
    def width(self) -> int:
        """Outputs of V that a head averages."""
        return self.value.shape[1] // self.heads.shared

    def turn(self, into: Tensor, output: Tensor | None = None) -> None:
        """Multiply V by `into` [shared, width, width]; `output`, like `stacked`, is to become O."""
        h = self.heads
        value = self.value.weight()[0].double().view(h.shared, self.width, -1)
        self.value.write((into @ value).flatten(0, 1).unsqueeze(0))
        bias = self.value.bias
        if bias is not None:
            turned = into @ bias.detach().double().view(h.shared, self.width, 1)
            with torch.no_grad():
                bias.copy_(turned.flatten())
        if output is not None:
            heads = output.reshape(h.shared, h.heads // h.shared, -1, self.width)  # [shared, repeats, m, width]
            self.output.write(heads.permute(2, 0, 1, 3).flatten(1).unsqueeze(0))

    def stacked(self) -> Tensor:
        """Return the O of the heads that share a V on top of each other: [shared, repeats * m, width] in fp64."""
        h = self.heads
        weight = self.output.weight()[0].double()
        output = weight.reshape(len(weight), h.shared, -1, self.width)
        return output.permute(1, 2, 0, 3).flatten(1, 2)


def rotate(
    replay: Replay, block: Block, sites: Sequence[Site], patterns: Mapping[str, Pattern]
) -> dict[str, list[str]]:
    """Turn every V and O of a block in place; return remarks for the report, by site.

    Parameters
    ----------
    replay : Replay
        Up to `block`.
    sites : sequence of Site
        Those of the block that may change; their modules' other parameters (biases) change with them.
    patterns : mapping
        By site.
    """
    heads = Heads.of(getattr(replay.model, "config", None))
    if heads is None or not sites:
        return {}
    args, kwargs = tree_map(to_fp32, replay.call_of(block, 0))

    def call() -> Tensor:
        with torch.no_grad():
            output = first_tensor(block.module(*args, **kwargs))
        if output is None:
            raise ZeroskipError(f"{block.name}: returns no tensor that could be compared; leave rotate out")
        return output

    with in_fp32(block.module):
        found = find_pairs(sites, heads, call)
    if not found:
        return {}
    outputs = [pair.output for pair in found]
    seen = collect(replay, block, outputs, {site.name: ("gram",) for site in outputs}, most=BATCHES)
    notes: dict[str, list[str]] = {}
    with in_fp32(block.module):
        for pair in found:
            tokens, stats = seen[pair.output.name]
            if tokens:
                notes[pair.value.name] = [turn(pair, stats["gram"][0], patterns[pair.output.name], call)]
    return notes


def find_pairs(sites: Sequence[Site], heads: Heads, call: Call) -> list[Pair]:
    """Find V and O among the sites of a block; every weight is as before when this returns.

    Parameters
    ----------
    sites : sequence of Site
        Those that may change.
    heads : Heads
    call : callable
        Runs the block in fp32 and returns its output.
    """
    order, want = _called(sites, call)
    found: list[Pair] = []
    for at, output in enumerate(order):
        for value in order[:at]:
            pair = Pair(value, output, heads)
            taken = any(each.value is value for each in found)
            if not taken and heads.join(value, output) and _passes(pair, call, want):
                found.append(pair)
                break
    return found


def turn(pair: Pair, gram: Tensor, pattern: Pattern, call: Call) -> str:
    """Turn one V and O; return a remark for the report.

    Parameters
    ----------
    gram : Tensor
        [heads * width, heads * width] X^T X of the inputs of O.
    pattern : Pattern
        Of O.
    call : callable
        As in `find_pairs`.
    """
    width, shared = pair.width, pair.heads.shared
    blocks = gram.double().view(shared, -1, width, shared, len(gram) // shared // width, width)
    energy = torch.einsum("srwsrv->swv", blocks)
    piles = max(1, width // pattern.of) if isinstance(pattern, NM) else 1
    dealt = torch.cat([torch.arange(first, width, piles) for first in range(piles)])
    into, output = [], []
    for matrix, squares in zip(pair.stacked(), energy, strict=True):
        size = squares.diagonal().mean().clamp_min(1e-30)
        factor, _ = cholesky(squares / size, RIDGE, pair.output.name)
        output.append(torch.linalg.svd(matrix @ factor, full_matrices=False).U[:, dealt])
        into.append(output[-1].t() @ matrix)
    old, before = _numbers(pair), call()
    pair.turn(torch.stack(into), torch.stack(output))
    change = _change(call(), before)
    if change < SAME:
        return f"values rotated, with {pair.output.name}"
    _put_back(old)
    return f"not rotated: the block's output would change by {change:.1g}"


def _called(sites: Sequence[Site], call: Call) -> tuple[list[Site], Tensor]:
    """Return the sites that are called just once, in the order of their calls, and what the block returns."""
    seen: list[Site] = []
    hooks = [site.module.register_forward_pre_hook(lambda *_, site=site: seen.append(site)) for site in sites]
    try:
        output = call()
    finally:
        for hook in hooks:
            hook.remove()
    return [site for site in dict.fromkeys(seen) if seen.count(site) == 1], output


def _passes(pair: Pair, call: Call, want: Tensor) -> bool:
    draw = torch.Generator().manual_seed(0)
    into = torch.linalg.qr(torch.randn(pair.heads.shared, pair.width, pair.width, generator=draw).double())[0]
    old = _numbers(pair)
    try:
        stacked = pair.stacked()
        pair.turn(into)
        alone = _change(call(), want)
        _put_back(old)
        pair.turn(into, stacked @ into.transpose(1, 2))
        return _change(call(), want) < SAME < alone / 10
    finally:
        _put_back(old)


def _change(output: Tensor, want: Tensor) -> float:
    return float((output - want).norm() / want.norm())


def _numbers(pair: Pair) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters of both layers with copies of their values."""
    layers = (pair.value.module, pair.output.module)
    return [(parameter, parameter.detach().clone()) for layer in layers for parameter in layer.parameters()]


@torch.no_grad()
def _put_back(old: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, value in old:
        parameter.copy_(value)

"""The kinds of dense model that the sparse one has to beat, and our own, ready to be called.

The best dense is the fastest of: torch eager in fp32 and bf16; oneDNN with prepacked weights; our own dense kernels;
and the whole model under torch.compile with freezing. Ours may run under torch.compile like theirs.
"""

from __future__ import annotations

import copy
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.bench.dense import rivals
from zeroskip.model import find_sites
from zeroskip.nn import PackedLinear
from zeroskip.planning.candidates import pack_as
from zeroskip.planning.folding import find_foldable, fold
from zeroskip.planning.install import put_in, weights_of
from zeroskip.planning.siblings import fuse

__all__ = ["Batch", "Entry", "compiled", "dense_models", "eager", "tokens_in"]

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Entry = Callable[[Batch], Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dense_models(model: nn.Module, dtype: str, batches: Sequence[Batch]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, model) for every kind of dense model that runs eagerly; `model` is fp32 and is not modified.

    `dtype` is that of the activations in the models with our own kernels: the same as in the sparse one. They get the
    fusions that the sparse one gets, found and raced on `batches`.
    """
    both = {"fp32": model, "bf16": copy.deepcopy(model).to(torch.bfloat16)}
    for values, plain in both.items():
        yield f"torch {values}", plain
    for values, plain in both.items():
        problem = rivals()["onednn"].problem(values)
        if problem is None:
            yield f"oneDNN prepacked {values}", _swapped(plain, _prepacked(values))
        else:
            log.info("oneDNN prepacked %s: %s", values, problem)
    for values in ("fp32", "bf16") if dtype == "fp32" else ("bf16",):
        yield f"our dense {values}", _fused(_swapped(both[dtype], _ours(values)), batches)


Build = Callable[[Tensor, Tensor | None], nn.Module]


def _swapped(model: nn.Module, build: Build) -> nn.Module:
    """Return the model with each linear layer replaced; what is not replaced is shared with `model`."""
    sites = find_sites(model, exclude=())
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    twin = copy.deepcopy(model, memo)
    for site in sites:
        put_in(twin, twin.get_submodule(site.name), build(*weights_of(site)))
    return twin


def _prepacked(values: str) -> Build:
    return lambda weight, bias: rivals()["onednn"].build(weight, bias, values, 8192)


def _ours(values: str) -> Build:
    return lambda weight, bias: PackedLinear.from_packed(pack_as("dense", weight, values, None), bias)


def _fused(model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """Fuse in a model of packed layers what `zs.compile` fuses."""
    call = partial(eager(model), min(batches, key=tokens_in))
    fold(model, find_foldable(model, call))
    fuse(model, call, [tokens_in(batch) for batch in batches])
    return model


def tokens_in(batch: Batch) -> int:
    """How many tokens a batch has, padding included."""
    return batch["input_ids"].numel()


def eager(model: nn.Module) -> Entry:
    """The model as it stands: batch -> last hidden states [rows, tokens, hidden]."""

    def call(batch: Batch) -> Tensor:
        with torch.inference_mode():
            hidden: Tensor = model(**batch)[0]
            return hidden

    return call


def compiled(model: nn.Module, batch: Batch) -> Entry:
    """The whole model under torch.compile for the shape of `batch`, weights frozen; compiled when this returns.

    Raises
    ------
    RuntimeError
        What torch says when it cannot compile, as where there is no C++ compiler.
    """

    def body(**batch: Tensor) -> Tensor:
        hidden: Tensor = model(**batch)[0]
        return hidden

    # torch keeps what it compiled by code object and asks one entry after the other whether it fits: with a code
    # object of its own, a model never waits for the checks of its rivals.
    own = types.FunctionType(body.__code__.replace(), body.__globals__, "forward", None, body.__closure__)
    quick = torch.compile(own, dynamic=False, fullgraph=True)
    inductor: Any = torch._inductor.config

    def call(batch: Batch) -> Tensor:
        with torch.inference_mode():
            hidden: Tensor = quick(**batch)
            return hidden

    with inductor.patch(freezing=True):
        call(batch)
    return call

"""Sites whose work is not told by a token count: convolutions, and the products of recurrent layers.

They are measured at the sizes they have when the model runs on the example inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from zeroskip.conv_layers import FORMATS, PackedConv, channels_last, geometry_of, in_channels_last
from zeroskip.formats import Packed, names
from zeroskip.model import Site, every_site
from zeroskip.planning.candidates import DENSE_FORMATS, NAMES, Call, Layout, few_zeros, format_layout
from zeroskip.planning.measure import Probe
from zeroskip.planning.tokens import Tokens
from zeroskip.planning.whole import evaluating, model_calls
from zeroskip.recurrent_layers import obstacle as split_obstacle
from zeroskip.recurrent_layers import products
from zeroskip.sites import ConvAdapter, RecurrentAdapter
from zeroskip.sites.conv import Conv, patches

__all__ = [
    "Example",
    "capture",
    "conv_layouts",
    "examples_of",
    "is_shaped",
    "key_of",
    "probe_of",
    "shaped_obstacle",
    "stand_in",
]


MOST_GROUPS = 64  # as one matrix it takes that many times the memory while it is packed


@dataclass(frozen=True)
class Example:
    """One call of a site's module.

    Attributes
    ----------
    shape : tuple of int
        Of the first argument; empty where that was a PackedSequence.
    tokens : int
        Rows of the product: positions of a convolution's output over the batch, steps x batch of a recurrent layer's
        input, the batch for its hidden state.
    last : bool
        Whether the channels came innermost in memory.
    """

    shape: tuple[int, ...]
    tokens: int
    last: bool = False


def is_shaped(site: Site) -> bool:
    return issubclass(site.adapter, ConvAdapter | RecurrentAdapter)


@torch.no_grad()
def capture(model: nn.Module, calls: Iterable[Callable[[], object]]) -> dict[str, Example]:
    """Run the calls and return the largest one of every site that needs an example, by its name."""
    sites = [site for site in every_site(model) if is_shaped(site)]
    found: dict[str, Example] = {}

    def hook(site: Site) -> Callable[..., None]:
        def run(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen = _example(site, args[0] if args else next(iter(kwargs.values())), output)
            if site.name not in found or seen.tokens > found[site.name].tokens:
                found[site.name] = seen

        return run

    handles = [site.module.register_forward_hook(hook(site), with_kwargs=True) for site in sites]
    try:
        for call in calls:
            call()
    finally:
        for handle in handles:
            handle.remove()
    return found


def examples_of(model: nn.Module, tokens: Tokens, example_inputs: Any) -> dict[str, Example]:
    """Return the examples of a model's shaped sites; none where it has no such site or nothing to run it on."""
    if not any(map(is_shaped, every_site(model))):
        return {}
    with evaluating(model):
        calls = model_calls(model, model, tokens.counts, example_inputs)
        return {} if isinstance(calls, str) else capture(model, calls.values())


def _example(site: Site, x: Any, output: Any) -> Example:
    if isinstance(site.module, nn.RNNBase):
        if isinstance(x, PackedSequence):
            return Example((), 0)
        batch = 1 if x.dim() == 2 else x.shape[0 if site.module.batch_first else 1]
        rows = x.numel() // x.shape[-1]
        return Example(tuple(x.shape), batch if "_hh_" in site.parameter else rows)
    last = x.dim() in FORMATS and x.is_contiguous(memory_format=FORMATS[x.dim()]) and not x.is_contiguous()
    return Example(tuple(x.shape), output.numel() // site.extent[0], last)


def shaped_obstacle(site: Site, example: Example | None) -> str | None:
    """Return why a shaped site cannot be measured or replaced, None if it can."""
    module = site.module
    if isinstance(module, nn.RNNBase) and (problem := split_obstacle(module)) is not None:
        return problem
    if site.shape[0] > MOST_GROUPS:
        return f"a convolution in {site.shape[0]} groups multiplies too little for what its patches cost"
    if type(module).__module__.partition(".")[0] != "torch":
        return f"{type(module).__name__} may compute in a way of its own"
    if example is None:
        return "the size of its input is not known; give example_inputs that reach it"
    return None if example.shape else "it is given a PackedSequence"


def key_of(site: Site, example: Example) -> tuple[Any, ...]:
    """Return what two sites of equal times have in common, besides their weights."""
    geometry = str(geometry_of(cast(Conv, site.module))) if issubclass(site.adapter, ConvAdapter) else ""
    return (geometry, example)


def stand_in(site: Site) -> nn.Linear:
    """Return the product of a recurrent layer that is this site, as a layer of its own."""
    product = products(cast(nn.RNNBase, site.module))[site.parameter]
    if site.scales is not None:
        product.__dict__["zeroskip_scales"] = site.scales
    return product


def probe_of(site: Site, example: Example, tokens: int) -> Probe:
    """Return random inputs of the example's size for a convolution.

    All layouts but the layer as it stands are given channels-last ones, as packed and channels-last layers return them.
    """
    conv = cast(Conv, site.module)
    draw = torch.Generator().manual_seed(tokens)
    x = torch.randn(example.shape, generator=draw).to(conv.weight.dtype)
    last, axes = channels_last(x), len(conv.kernel_size)
    batched = x if x.dim() == axes + 2 else x.unsqueeze(0)
    cut = patches(conv, batched)  # [groups, tokens, positions x channels] -> [tokens, positions x groups x channels]
    rows = cut.view(*cut.shape[:2], -1, batched.shape[1] // conv.groups).permute(1, 2, 0, 3).flatten(1)
    return Probe(last, rows, partial(_rows, axes), {} if example.last else {"linear": x})


def _rows(axes: int, y: Tensor) -> Tensor:
    return y.movedim(-axes - 1, -1).reshape(-1, y.shape[-axes - 1])


def conv_layouts(
    site: Site, weight: Tensor, bias: Tensor | None, values: tuple[str, ...], batch_invariant: bool = False
) -> tuple[list[Layout], dict[str, str]]:
    """As `candidates.layouts`, for a convolution; the dense ones are torch's own, channels first and channels last.

    Our dense format takes one in groups only for a batch-invariant plan, which torch cannot serve.
    """
    conv = cast(Conv, site.module)
    own = NAMES.get(weight.dtype, str(weight.dtype))
    nbytes, grouped = conv.weight.nbytes, site.shape[0] > 1
    found = [
        Layout(f"linear {own}", "linear", own, ("torch",), True, nbytes, partial(_copies, conv), lambda: conv),
    ]
    if conv.weight.dim() in FORMATS:
        last = partial(in_channels_last, conv)
        copies = partial(_copies, last())
        found.append(Layout(f"channels_last {own}", "channels_last", own, ("torch",), True, nbytes, copies, last))
    refused: dict[str, str] = {}
    few = few_zeros(site.weight())
    for kind in values:
        for name in names():
            if name in DENSE_FORMATS and grouped and not batch_invariant:
                refused[f"{name} {kind}"] = "it would multiply what a group does not look at"
                continue
            made = (
                few if few and name not in DENSE_FORMATS else format_layout(name, weight, bias, kind, site.whole_scales)
            )
            if isinstance(made, Layout) and made.packed is not None:
                packed = made.packed
                calls = partial(_forced, conv, packed, bias)
                found.append(replace(made, copies=calls, install=partial(PackedConv.of, conv, packed, bias)))
            else:
                refused[f"{name} {kind}"] = str(made)
    return found, refused


def _copies(module: nn.Module, kernel: str, count: int) -> list[Call]:
    return [copy.deepcopy(module) for _ in range(count)]


def _forced(conv: Conv, packed: Packed, bias: Tensor | None, kernel: str, count: int) -> list[Call]:
    """Packed convolutions, each with a copy of the blob, that go through one kernel."""
    found: list[Call] = []
    for _ in range(count):
        own = Packed.from_blob(packed.blob.clone())
        found.append(PackedConv.of(conv, own, bias))
        found[-1].kernel = kernel  # type: ignore[attr-defined]
    return found

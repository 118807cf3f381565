"""Sites whose work is not told by a token count: convolutions, and the products of layers that are taken apart.

They are measured at the sizes they have when the model runs on the example inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
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
from zeroskip.planning.products import product_of
from zeroskip.planning.tokens import Tokens
from zeroskip.planning.whole import evaluating, model_calls
from zeroskip.sites import ConvAdapter, ExpertsAdapter
from zeroskip.sites.conv import Conv, patches
from zeroskip.split_layers import Stack, split_of

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


Called = tuple[int, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """One call of a site's module.

    Attributes
    ----------
    shape : tuple of int
        Of the first argument; empty where that was a PackedSequence or a nested tensor.
    tokens : int
        Rows of the product: positions of a convolution's output over the batch, steps x batch of a recurrent layer's
        input, the batch for its hidden state, length x batch of attention, what an expert gets on average.
    last : bool
        Whether the channels came innermost in memory.
    calls : tuple of (tokens, args, kwargs)
        The calls themselves, one for each number of rows from few to many, of layers whose first argument does not say
        all. Their products are measured at each; any other at the largest call alone.
    """

    shape: tuple[int, ...]
    tokens: int
    last: bool = False
    calls: tuple[Called, ...] = field(default=(), compare=False, repr=False)

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of rows to measure a product at."""
        return tuple(call[0] for call in self.calls) or (self.tokens,)

    def with_calls(self, other: Example) -> Example:
        """Return the larger of two examples with the calls of both."""
        first, second = sorted((self, other), key=lambda each: each.tokens)
        known = {call[0]: call for call in (*first.calls, *second.calls)}
        return replace(second, calls=tuple(known[count] for count in sorted(known)))


def is_shaped(site: Site) -> bool:
    return issubclass(site.adapter, ConvAdapter) or split_of(site.module) is not None


@torch.no_grad()
def capture(model: nn.Module, calls: Iterable[Callable[[], object]]) -> dict[str, Example]:
    """Run the calls and return the largest one of every site that needs an example, by its name."""
    sites = [site for site in every_site(model) if is_shaped(site)]
    found: dict[str, Example] = {}

    def hook(site: Site) -> Callable[..., None]:
        def run(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen = _example(site, args, kwargs, output)
            found[site.name] = seen.with_calls(found[site.name]) if site.name in found else seen

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


def _example(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Example:
    x: Any = args[0] if args else next(iter(kwargs.values()))
    if isinstance(site.module, nn.MultiheadAttention):
        if x.is_nested:
            return Example((), 0)
        rows = x.numel() // x.shape[-1]
        return Example(tuple(x.shape), rows, calls=((rows, args, kwargs),))
    if issubclass(site.adapter, ExpertsAdapter):
        chosen = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and not a.is_floating_point()]
        if not chosen:
            return Example((), 0)
        rows = -(-chosen[0].numel() // site.shape[0])
        return Example(tuple(x.shape), rows, calls=((rows, args, kwargs),))
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
    module, kind = site.module, split_of(site.module)
    if kind is not None and (problem := kind.obstacle(module)) is not None:
        return problem
    if kind is None and site.shape[0] > MOST_GROUPS:
        return f"a convolution in {site.shape[0]} groups multiplies too little for what its patches cost"
    if type(module).__module__.partition(".")[0] != "torch" and not issubclass(site.adapter, ExpertsAdapter):
        return f"{type(module).__name__} may compute in a way of its own"
    if example is None:
        return "the size of its input is not known; give example_inputs that reach it"
    return None if example.shape else "it is given sequences of different lengths, or what it is given is not known"


def key_of(site: Site, example: Example) -> tuple[Any, ...]:
    """Return what two sites of equal times have in common, besides their weights."""
    geometry = str(geometry_of(cast(Conv, site.module))) if issubclass(site.adapter, ConvAdapter) else ""
    return (geometry, example, example.counts)


def stand_in(site: Site) -> nn.Linear:
    """Return the product that is this site of a layer taken apart, as a linear layer; of a stack the first."""
    product = product_of(site)
    if isinstance(product, Stack):
        layer = nn.Linear(product.in_features, product.out_features, product.bias is not None, device="meta")
        layer.weight = nn.Parameter(product.weight[0], requires_grad=False)
        if isinstance(product.bias, Tensor):
            layer.bias = nn.Parameter(product.bias[0], requires_grad=False)
    else:
        layer = cast(nn.Linear, product)
    if site.scales is not None:
        layer.__dict__["zeroskip_scales"] = site.scales[:1]
    return layer


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

"""Put what a plan chose into the model's sites, and take it out again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from zeroskip import ops
from zeroskip.bench.dense import rivals
from zeroskip.conv_layers import PackedConv, in_channels_last
from zeroskip.dense_layers import DTYPES, DenseLinear, OneDnnLinear, RowLinear, onednn_problem
from zeroskip.embedding_layers import PackedEmbedding
from zeroskip.errors import ZeroskipError, suggest
from zeroskip.formats import Packed, unpack
from zeroskip.model import Site, find_sites
from zeroskip.nn import PackedLinear
from zeroskip.planning.candidates import NAMES, pack_as
from zeroskip.planning.folding import fold, unfold
from zeroskip.planning.machine import this_machine
from zeroskip.planning.plan import Plan, SitePlan
from zeroskip.planning.products import one_kernel, packed_stack, product_of, serve
from zeroskip.planning.reread import reread, weight_files
from zeroskip.planning.rows import pin
from zeroskip.planning.siblings import join
from zeroskip.planning.tables import build_table, is_table, tables
from zeroskip.sites import ConvAdapter
from zeroskip.sites.conv import Conv
from zeroskip.split_layers import PackedStack, Split, Stack, split_of

__all__ = [
    "apply_tuning",
    "build",
    "build_split",
    "compiled_layers",
    "put_all",
    "put_in",
    "row_by_row",
    "stored_weight",
    "thaw",
    "together",
    "weights_of",
]

log = logging.getLogger(__name__)

COMPILED = (PackedLinear, PackedStack, OneDnnLinear, DenseLinear)


def weights_of(site: Site) -> tuple[Tensor, Tensor | None]:
    """Return the site's weight [m, k], contiguous, and its bias [m]; views where possible."""
    bias = site.bias
    return site.whole().detach().contiguous(), None if bias is None else bias.detach()


def build(choice: SitePlan, site: Site, tokens: int) -> nn.Module:
    """Return the module that the plan wants at this site; the site's own where it stays dense as it is.

    Of a layer that is taken apart it is the product that the site is.

    The tuning table of the process is filled for the packed weight. `tokens` is the largest count to be good at.

    Raises
    ------
    ZeroskipError
        If the format cannot hold the weight: its zeros are not those the plan was made for.
    """
    if choice.format == "linear" and choice.values == choice.dtype:
        return product_of(site) or site.module
    if is_table(site):
        return build_table(choice, site)
    with torch.inference_mode(False), torch.no_grad():
        if choice.format == "channels_last":
            return in_channels_last(site.module)
        weight, bias = weights_of(site)
        if choice.format in rivals():
            if isinstance(whole := product_of(site), Stack):
                return whole
            return rivals()[choice.format].build(weight, bias, choice.values, tokens)
        try:
            if isinstance(whole := product_of(site), Stack):
                return packed_stack(choice, site, whole)
            packed = pack_as(choice.format, weight, choice.values, site.whole_scales)
            serve(packed, choice)
        except ValueError as error:
            raise ZeroskipError(f"{choice.name}: the plan's {choice.label} does not fit: {error}") from error
        if issubclass(site.adapter, ConvAdapter):
            layer: PackedLinear = PackedConv.of(cast(Conv, site.module), packed, bias)
        else:
            layer = PackedLinear.from_packed(packed, bias, None)
        layer.kernel = one_kernel(choice) if choice.pinned else None
        return layer


def row_by_row(model: nn.Module, names: Iterable[str]) -> None:
    """Let torch compute these linear layers one row at a time; names that the model has not are passed over."""
    layers = dict(model.named_modules(remove_duplicate=False))
    found = [layer for name in names if isinstance(layer := layers.get(name), nn.Linear)]
    put_all(model, [(layer, RowLinear.of(layer)) for layer in found if type(layer) is nn.Linear])


def together(sites: Iterable[Site]) -> list[list[Site]]:
    """Return the sites in groups that one module replaces: the products of a layer taken apart; any other alone."""
    groups: dict[tuple[int, str], list[Site]] = {}
    for site in sites:
        groups.setdefault((id(site.module), "" if split_of(site.module) else site.name), []).append(site)
    return list(groups.values())


def build_split(choices: Sequence[SitePlan], sites: Sequence[Site], tokens: int) -> nn.Module:
    """Return what a plan wants in the place of a layer taken apart; the layer itself where nothing of it is packed."""
    old, kind = sites[0].module, split_of(sites[0].module)
    if kind is None or not any(choice.is_packed for choice in choices):
        return old
    parts = {site.parameter: build(choice, site, tokens) for choice, site in zip(choices, sites, strict=True)}
    return kind(old, parts).train(old.training)


def put_in(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace the module `old` by `new` under every name it has in the model."""
    put_all(model, [(old, new)])


def put_all(model: nn.Module, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Replace the first module of each pair by the second, in one walk over the model."""
    swaps = {id(old): (old, new) for old, new in pairs if old is not new}
    if not swaps:
        return
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in swaps:
                parent._modules[name] = swaps[id(child)][1]


def compiled_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for every layer that a plan put into the model."""
    for name, module in model.named_modules():
        if isinstance(module, COMPILED):
            yield name, module


def stored_weight(layer: nn.Module) -> Tensor:
    """Return the dense weight [m, k] (of a stack [count, m, k]) of an installed layer, in its stored precision."""
    if isinstance(layer, PackedLinear):
        return unpack(Packed.from_blob(layer.weight.detach()))
    if isinstance(layer, PackedStack):
        return torch.stack([unpack(each) for each in layer.packed])
    return cast(Tensor, layer.weight).detach()


def thaw(model: nn.Module, dtypes: dict[str, torch.dtype] | None = None, only: set[str] | None = None) -> list[str]:
    """Turn installed layers back into nn.Linear, in place, and return their names.

    The weight is read again from the safetensors files that the model was loaded from if it is there with the same
    values (up to the stored precision), else it is the stored one: a weight packed in bf16 stays rounded to bf16.

    Parameters
    ----------
    dtypes : {name: dtype}, optional
        Of the dense layers; by default that of the model's other parameters, else the stored one.
    only : set of str, optional
        The names to treat; all of them by default.
    """
    names = _close(model, dtypes, only) + _whole(model, only)
    files = weight_files(model)
    common = next((p.dtype for n, p in _outside(model) if p.is_floating_point()), None)
    for name, layer in list(compiled_layers(model)):
        if only is not None and name not in only:
            continue
        with torch.inference_mode(False), torch.no_grad():
            weight = stored_weight(layer)
            dtype = (dtypes or {}).get(name, common or weight.dtype)
            if isinstance(layer, PackedConv | PackedEmbedding):
                put_in(model, layer, layer.dense(weight.to(dtype)).train(layer.training))
                names.append(name)
                continue
            dense = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta", dtype=dtype)
            dense.weight = nn.Parameter(reread(files, name, weight, dtype), requires_grad=False)
            if isinstance(layer.bias, Tensor):
                dense.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
        if isinstance(layer, PackedLinear) and layer.siblings is not None:
            layer.siblings.part()
        if isinstance(layer, PackedLinear):
            unfold(model, layer)
        dense.train(layer.training)
        if isinstance(layer, PackedLinear) and layer.packed.scales is not None:  # so that the same codes can come again
            dense.__dict__["zeroskip_scales"] = layer.packed.scales.unsqueeze(0)
        put_in(model, layer, dense)
        names.append(name)
    return names


def _close(model: nn.Module, dtypes: dict[str, torch.dtype] | None, only: set[str] | None) -> list[str]:
    """Turn layers that were taken apart back into what they were, in place, and return their names."""
    common = next((p.dtype for n, p in _outside(model) if p.is_floating_point()), torch.float32)
    names: list[str] = []
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Split) or (only is not None and name not in only):
            continue
        with torch.inference_mode(False), torch.no_grad():
            dtype = (dtypes or {}).get(name, common)
            weights = {
                part: (stored_weight(child).to(dtype), cast("Tensor | None", child.bias))
                for part, child in layer.parts.items()
            }
            put_in(model, layer, layer.dense(weights).train(layer.training))
        names.append(name)
    return names


def _whole(model: nn.Module, only: set[str] | None) -> list[str]:
    """Let layers that torch computed row by row have whole batches again."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, RowLinear) and (only is None or n in only)}
    put_all(model, [(layer, layer.plain()) for layer in found.values()])
    return list(found)


def apply_tuning(model: nn.Module, plan: Plan) -> None:
    """Make a freshly loaded model run as its plan says.

    On the plan's machine the tuning table is filled and layers prepacked for oneDNN are prepacked again. On another
    one the default kernels serve until `zeroskip.compile` measures again, and the log says so. Layers that are dense
    in another precision than the model's are set up in any case: their weights have that precision.
    """
    changes = plan.machine.differences(this_machine())
    if changes:
        log.warning("the plan was measured elsewhere (%s): default kernels serve; compile anew", changes[0])
    layers = dict(model.named_modules())
    for choice in plan.sites:
        layer = layers.get(choice.name)
        if layer is None:
            continue
        if isinstance(layer, PackedStack):
            for packed in layer.packed if not changes else ():
                ops.tune(packed, choice.kernels)
        elif isinstance(layer, PackedLinear):
            if choice.pinned:
                _pin_again(layer, choice)
            elif not changes and choice.is_packed and choice.kernels:  # an embedding has none
                ops.tune(layer.packed, choice.kernels)
        elif choice.format == "channels_last" and not changes:
            put_in(model, layer, in_channels_last(layer))
        elif isinstance(layer, nn.Linear) and not choice.is_packed:
            _set_up_dense(model, layer, choice, max(plan.tokens.counts), at_home=not changes)
    row_by_row(model, plan.rows)
    fold(model, plan.folded)
    if not changes:
        join(model, plan.fused)


def _pin_again(layer: PackedLinear, choice: SitePlan) -> None:
    """Keep a site batch-invariant wherever it is loaded: its kernel gives the same bits on every CPU that has it."""
    dtype = next((each for each, name in NAMES.items() if name == choice.dtype), torch.float32)
    if not pin(layer, dtype, one_kernel(choice)):
        log.warning("%s: no kernel here gives a row the same bits in every batch; compile anew", choice.name)


def _set_up_dense(model: nn.Module, layer: nn.Linear, choice: SitePlan, tokens: int, at_home: bool) -> None:
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    with torch.inference_mode(False), torch.no_grad():
        if choice.format == "onednn" and at_home and onednn_problem(choice.values) is None:
            put_in(model, layer, OneDnnLinear(weight, bias, choice.values, tokens))
        elif choice.values != choice.dtype and choice.values in DTYPES and type(layer) is nn.Linear:
            put_in(model, layer, DenseLinear.pack(weight, bias, choice.values))


def _outside(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    inside = {name for name, _ in compiled_layers(model)}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in inside:
            yield name, parameter


def fits(plan: Plan, model: nn.Module) -> dict[str, Site]:
    """Return the sites of the model by name, after checking that the plan is one for this model.

    Raises
    ------
    ZeroskipError
        If the plan names a site that the model has not, or one of another shape or dtype.
    """
    every = [*find_sites(model, exclude=()), *(site for site, _ in tables(model))]
    sites = {site.name: site for site in every}
    for choice in plan.sites:
        site = sites.get(choice.name)
        if site is None:
            raise ZeroskipError(f"the plan is for another model: no site {choice.name!r}{suggest(choice.name, sites)}")
        found = (*site.extent, NAMES.get(site.weight().dtype, ""))
        if found != (*choice.shape, choice.dtype):
            want = "x".join(map(str, choice.shape))
            raise ZeroskipError(
                f"the plan is for another model: {choice.name} is {found[0]}x{found[1]} {found[2]}, "
                f"the plan says {want} {choice.dtype}"
            )
    return sites

"""The layers that compiling put into a model: how each is stored, and how it is put back when the model is loaded.

A `PackedLinear` is stored as its blob. A dense layer of ours (another precision, or prepacked by torch) is stored as
the ordinary weight it holds, in its own precision, and comes back as nn.Linear; the plan then sets it up anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from zeroskip.conv_layers import PackedConv, geometry_of, geometry_problem
from zeroskip.dense_layers import DTYPES, DenseLinear, OneDnnLinear
from zeroskip.embedding_layers import PackedEmbedding
from zeroskip.errors import ZeroskipError
from zeroskip.io.container import Later
from zeroskip.io.verify import ALIGNMENT, blobs_of, verify
from zeroskip.nn import PackedLinear
from zeroskip.ops import ACTIVATIONS
from zeroskip.planning.install import compiled_layers, put_in
from zeroskip.sites import Conv1DAdapter, Site, sites_in
from zeroskip.sites.conv import KINDS, Conv
from zeroskip.split_layers import PackedStack, split_of

__all__ = [
    "blobs_of",
    "describe_sites",
    "dtype_name",
    "finish",
    "identity",
    "is_float",
    "site_problem",
    "straighten",
    "swap",
    "tensors_of",
    "verify",
]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_sites(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what rebuilds each layer that compiling put in, beside its tensors; plain values for JSON."""
    sites: dict[str, dict[str, Any]] = {}
    for name, module in compiled_layers(model):
        layer: Any = module
        site: dict[str, Any] = {"shape": [layer.out_features, layer.in_features]}
        if isinstance(module, PackedLinear):
            packed = module.packed
            site |= {"kind": "packed", "format": packed.format, "values": packed.values, "nbytes": packed.nbytes}
            site |= {"activation": module.activation}
            if isinstance(module, PackedConv):
                site["conv"] = geometry_of(module)
            if isinstance(module, PackedEmbedding):
                site["table"] = True
        elif isinstance(module, PackedStack):
            first = module.packed[0]
            site |= {"kind": "packed", "format": first.format, "values": first.values}
            site |= {"nbytes": sum(module.sizes), "stack": list(module.sizes), "activation": None}
        else:
            dtype = DTYPES[module.values] if isinstance(module, OneDnnLinear) else layer.weight.dtype
            site |= {"kind": "dense", "dtype": dtype_name(dtype), "transposed": False}
        sites[name] = site | {"bias": None if layer.bias is None else dtype_name(layer.bias.dtype)}
    return sites


def site_problem(site: Any) -> str | None:
    """Return what is wrong with one entry of `describe_sites` that was read from a file, or None."""
    if not isinstance(site, dict):
        return f"a {type(site).__name__}, not an object"
    shape, bias, kind = site.get("shape"), site.get("bias"), site.get("kind")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in shape):
        return f"shape {shape!r} is not two positive whole numbers"
    if "bias" not in site:
        return "bias is missing"
    if bias is not None and not is_float(bias):
        return f"bias {bias!r} is not a floating-point type"
    if kind == "dense":
        return None if is_float(site.get("dtype")) else f"dtype {site.get('dtype')!r} is not a floating-point type"
    if kind != "packed":
        return f"kind {kind!r} is not known to this zeroskip; update it"
    nbytes, activation = site.get("nbytes"), site.get("activation")
    if type(nbytes) is not int or not 0 < nbytes < 1 << 48 or nbytes % ALIGNMENT:
        return f"nbytes {nbytes!r} is not a positive multiple of {ALIGNMENT}"
    if activation is not None and activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    if site.get("table", True) is not True or ("table" in site and bias is not None):
        return "table, where it is there, is true, and tables have no bias"
    if "stack" in site:
        sizes = site["stack"]
        if not isinstance(sizes, list) or not all(type(n) is int and n > 0 and n % ALIGNMENT == 0 for n in sizes):
            return f"stack {sizes!r} is not positive multiples of {ALIGNMENT}"
        if sum(sizes) != nbytes:
            return f"stack has {sum(sizes)} bytes where nbytes is {nbytes}"
    return geometry_problem(site["conv"]) if "conv" in site else None


def is_float(name: Any) -> bool:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def swap(model: nn.Module, sites: Mapping[str, dict[str, Any]], where: str | Path) -> None:
    """Put an empty layer, on the meta device, in the place of every site.

    Raises
    ------
    ZeroskipError
        If the model has no such layer, or one of another shape. The model is then as it was.
    """
    for name, site in sites.items():
        _check(model, name, site, where)
    _open(model, sites)
    for old, site in [(model.get_submodule(name), site) for name, site in sites.items()]:
        if site.get("transposed"):  # loaded into the model's own Conv1D, then straightened
            for name, dtype in (("weight", site["dtype"]), ("bias", site["bias"])):
                if dtype is not None:
                    empty = torch.empty_like(getattr(old, name), dtype=getattr(torch, dtype), device="meta")
                    setattr(old, name, nn.Parameter(empty, requires_grad=False))
        else:
            put_in(model, old, _empty(site).train(old.training))


def _open(model: nn.Module, sites: Iterable[str]) -> None:
    """Take the layers apart of which a product is stored packed."""
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in sites):
        module = model.get_submodule(owner)
        kind = split_of(module)
        if kind is not None:
            put_in(model, module, kind(module, kind.products(module)).train(module.training))


def _check(model: nn.Module, name: str, site: Mapping[str, Any], where: str | Path) -> None:
    owner, _, parameter = name.rpartition(".")
    try:
        parent = model.get_submodule(owner)
        kind = split_of(parent)
        own = {each.child: each for each in sites_in(owner, parent)} if kind is not None else {}
        inside = own.get(parameter)
        module = parent if inside else model.get_submodule(name)
    except AttributeError:
        raise ZeroskipError(f"{where}: site {name}: a {type(model).__name__} has no such layer") from None
    layer: Any = module
    if isinstance(module, PackedLinear | OneDnnLinear):
        shape = [layer.out_features, layer.in_features]
    else:
        try:
            shape = list((inside or Site(name, module)).extent)
        except ZeroskipError:
            raise ZeroskipError(f"{where}: site {name}: a {type(module).__name__} cannot be packed") from None
    if shape != site["shape"]:
        raise ZeroskipError(f"{where}: site {name}: stored as {site['shape']} where the model has {shape}")
    if site.get("transposed") and not Conv1DAdapter.matches(module):
        raise ZeroskipError(f"{where}: site {name}: stored transposed, which a {type(module).__name__} is not")
    if site.get("table", False) != isinstance(module, nn.Embedding | PackedEmbedding):
        stored = "table" if "table" in site else "layer that multiplies"
        raise ZeroskipError(f"{where}: site {name}: stored as a {stored} where the model has a {type(module).__name__}")
    has = geometry_of(cast(Conv, module)) if isinstance(module, (*KINDS, PackedConv)) else None
    if site.get("conv") != has:
        raise ZeroskipError(f"{where}: site {name}: stored as convolution {site.get('conv')} where the model has {has}")
    count = inside.shape[0] if inside is not None else 1
    if len(site.get("stack", [0])) != count:
        raise ZeroskipError(
            f"{where}: site {name}: stored as {len(site.get('stack', [0]))} where the model has {count}"
        )
    problem = kind.obstacle(module) if inside is not None and kind is not None else None
    if problem is not None:
        raise ZeroskipError(f"{where}: site {name}: the {type(module).__name__} cannot be taken apart: {problem}")


def _empty(site: Mapping[str, Any]) -> nn.Module:
    (rows, columns), bias = site["shape"], site["bias"]
    layer: nn.Module
    with torch.device("meta"):
        if "table" in site:
            layer = PackedEmbedding(columns, rows, site["nbytes"])
        elif "stack" in site:
            layer = PackedStack(columns, rows, site["stack"], bias is not None)
        elif "conv" in site:
            layer = PackedConv(columns, rows, site["nbytes"], site["conv"], bias is not None)
        elif site["kind"] == "packed":
            layer = PackedLinear(columns, rows, site["nbytes"], bias is not None, site.get("activation"))
        else:
            layer = nn.Linear(columns, rows, bias is not None, dtype=getattr(torch, site["dtype"]))
            layer.requires_grad_(False)
        if bias is not None:
            count = (len(site["stack"]),) if "stack" in site else ()
            layer.bias = nn.Parameter(torch.empty(*count, rows, dtype=getattr(torch, bias)), requires_grad=False)
    return layer


def straighten(model: nn.Module, sites: Mapping[str, dict[str, Any]]) -> dict[str, nn.Module]:
    """Turn the dense sites that were loaded as Conv1D into nn.Linear, which a plan can set up; return the old ones."""
    turned: dict[str, nn.Module] = {}
    for name, site in sites.items():
        if site.get("transposed"):
            old: Any = model.get_submodule(name)
            rows, columns = site["shape"]
            layer = nn.Linear(columns, rows, old.bias is not None, device="meta")
            layer.weight = nn.Parameter(old.weight.detach().t().contiguous(), requires_grad=False)
            layer.bias = old.bias
            put_in(model, old, layer.train(old.training))
            turned[name] = old
    return turned


def finish(
    model: nn.Module, sites: Mapping[str, dict[str, Any]], dtype: str | None, turned: Mapping[str, nn.Module]
) -> None:
    """See to the dense sites that no plan set up: those not in the model's `dtype` still compute in their own."""
    for name, site in sites.items():
        layer = model.get_submodule(name)
        if site["kind"] != "dense" or type(layer) is not nn.Linear:
            continue
        values = next((text for text, known in DTYPES.items() if known == layer.weight.dtype), None)
        if values is not None and dtype_name(layer.weight.dtype) != dtype:
            put_in(model, layer, DenseLinear.pack(layer.weight, layer.bias, values).train(layer.training))
        elif name in turned:
            put_in(model, layer, turned[name])


def tensors_of(model: nn.Module) -> dict[str, Tensor | Later]:
    """Return the tensors a state dict holds, under all their names; none is copied.

    A weight that torch keeps prepacked becomes dense only when it is its turn to be written.
    """
    tensors: dict[str, Tensor | Later] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = name + "." if name else ""
        if isinstance(module, OneDnnLinear):
            shape = (module.out_features, module.in_features)
            tensors[f"{prefix}weight"] = Later(DTYPES[module.values], shape, _weight_of(module))
            if module.bias is not None:
                tensors[f"{prefix}bias"] = cast(Tensor, module.bias)
            continue
        own: dict[str, Any] = {}
        module._save_to_state_dict(own, prefix, keep_vars=True)
        for key, value in own.items():
            if not isinstance(value, Tensor):
                raise ZeroskipError(f"{key}: extra state ({type(value).__name__}) cannot be stored, only tensors can")
            tensors[key] = value
    return tensors


def _weight_of(module: OneDnnLinear) -> Callable[[], Tensor]:
    return lambda: module.weight


def identity(tensor: Tensor | Later) -> tuple[Any, ...]:
    """Return what two names of one tensor have in common: the memory it lies in, seen the same way."""
    if isinstance(tensor, Later) or tensor.device.type == "meta" or tensor.numel() == 0:
        return (id(tensor),)
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()

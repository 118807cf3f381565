"""The layers that compiling put into a model: what is stored of them, and how they are put back on loading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeroskip.dense_layers import OneDnnLinear
from zeroskip.errors import ZeroskipError
from zeroskip.io.kinds import Kind, kind_of, kind_stored, kinds_in
from zeroskip.io.tensors import dtype_name, is_float
from zeroskip.nn import PackedLinear
from zeroskip.planning.install import compiled_layers, put_in
from zeroskip.sites import Site, sites_in
from zeroskip.split_layers import split_of

__all__ = ["describe_sites", "site_problem", "swap"]


def describe_sites(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what rebuilds each layer that compiling put in, beside its tensors; plain values for JSON."""
    return {name: _describe(layer) for name, layer in compiled_layers(model)}


def _describe(layer: Any) -> dict[str, Any]:
    kind = kind_of(layer)
    about = {"shape": [layer.out_features, layer.in_features], "kind": kind.kind, **kind.describe(layer)}
    return about | {"bias": None if layer.bias is None else dtype_name(layer.bias.dtype)}


def site_problem(site: Any) -> str | None:
    """Return what is wrong with one entry of `describe_sites` that was read from a file, or None."""
    if not isinstance(site, dict):
        return f"a {type(site).__name__}, not an object"
    shape, bias, kinds = site.get("shape"), site.get("bias"), kinds_in(site)
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in shape):
        return f"shape {shape!r} is not two positive whole numbers"
    if "bias" not in site:
        return "bias is missing"
    if bias is not None and not is_float(bias):
        return f"bias {bias!r} is not a floating-point type"
    if not kinds:
        return f"kind {site.get('kind')!r} is not known to this zeroskip; update it"
    for kind in kinds:
        if (problem := kind.problem(site)) is not None:
            return problem
    strange = [kind.mark for kind in Kind.known if kind.mark in site and kind not in kinds]
    return f"{strange[0]} is nothing that a {site['kind']} layer has" if strange else None


def swap(model: nn.Module, sites: Mapping[str, dict[str, Any]], where: str | Path) -> None:
    """Put an empty layer, on the meta device, in the place of every site.

    Raises
    ------
    ZeroskipError
        If the model has no such layer, or one of another shape. The model is then as it was.
    """
    for name, site in sites.items():
        problem = _mismatch(model, name, site)
        if problem is not None:
            raise ZeroskipError(f"{where}: site {name}: {problem}")
    _open(model, sites)
    for old, site in [(model.get_submodule(name), site) for name, site in sites.items()]:
        put_in(model, old, _empty(site, old).train(old.training))


def _open(model: nn.Module, sites: Iterable[str]) -> None:
    """Take the layers apart of which a product is stored packed."""
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in sites):
        module = model.get_submodule(owner)
        kind = split_of(module)
        if kind is not None:
            put_in(model, module, kind(module, kind.products(module)).train(module.training))


def _mismatch(model: nn.Module, name: str, site: Mapping[str, Any]) -> str | None:
    """Return what keeps a stored layer from its place in the model, or None."""
    owner, _, parameter = name.rpartition(".")
    try:
        parent = model.get_submodule(owner)
        split = split_of(parent)
        inside = None if split is None else {each.child: each for each in sites_in(owner, parent)}.get(parameter)
        module: Any = parent if inside else model.get_submodule(name)
    except AttributeError:
        return f"a {type(model).__name__} has no such layer"
    if isinstance(module, PackedLinear | OneDnnLinear):
        shape = [module.out_features, module.in_features]
    else:
        try:
            shape = list((inside or Site(name, module)).extent)
        except ZeroskipError:
            return f"a {type(module).__name__} cannot be packed"
    if shape != site["shape"]:
        return f"stored as {site['shape']} where the model has {shape}"
    for kind in Kind.known:
        if (problem := kind.differs(site, module, inside)) is not None:
            return problem
    problem = split.obstacle(module) if inside is not None and split is not None else None
    return None if problem is None else f"the {type(module).__name__} cannot be taken apart: {problem}"


def _empty(site: Mapping[str, Any], old: nn.Module) -> nn.Module:
    with torch.device("meta"):
        layer: Any = kind_stored(site).empty(site, old)
        if site["bias"] is not None:
            bias = torch.empty_like(layer.bias, dtype=getattr(torch, site["bias"]), device="meta")
            layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer  # type: ignore[no-any-return]

"""The sites of a model: which weights can be pruned and packed, and which of them the user wants. Kinds: `sites/`."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from zeroskip.errors import ZeroskipError, expect, suggest
from zeroskip.sites import Adapter, Site, sites_in

__all__ = [
    "BARRED",
    "Adapter",
    "Site",
    "every_site",
    "find_sites",
    "fits",
    "replace",
    "select_sites",
    "site_patterns",
    "tied",
    "unwrapped",
]

BARRED = "excluded by"


def find_sites(
    model: nn.Module, include: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = ("lm_head",)
) -> list[Site]:
    """Return the sites of `model` in module order.

    Parameters
    ----------
    model : nn.Module
        Any module. Sites are the weights of linear layers (torch's and transformers'), convolutions, recurrent layers,
        nn.MultiheadAttention, embeddings and stacked experts.
    include, exclude : patterns, optional
        Globs on site names ("rnn.weight_*"); a glob that fits the last dotted part counts too ("lm_head" fits
        "model.lm_head"). "re:..." is a regular expression that must fit the whole name. `exclude`
        wins over `include`. Embeddings, depthwise convolutions and weights tied to another module (the same memory)
        are left out unless a pattern of `include` without a wildcard in its last part fits.

    Raises
    ------
    ZeroskipError
        If a pattern names no site; it suggests the nearest name. Of `exclude`, "lm_head" may name none, and "" does.
    """
    return select_sites(model, include, exclude)[0]


def select_sites(
    model: nn.Module, include: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = ("lm_head",)
) -> tuple[list[Site], dict[str, str]]:
    """As `find_sites`, with the reason for every site that was named out: ({sites}, {name: reason})."""
    expect("model", model, nn.Module, "an nn.Module")
    wanted = site_patterns("include", include)
    unwanted = tuple(pattern for pattern in site_patterns("exclude", exclude) if pattern)
    every = every_site(model)
    names = [site.name for site in every]
    for what, patterns in (("include", wanted), ("exclude", (p for p in unwanted if p != "lm_head"))):
        for pattern in patterns:
            if not any(fits(pattern, name) for name in names):
                raise ZeroskipError(f"{what} {pattern!r} names no site" + suggest(pattern, names))
    twins = tied(model)
    sites: list[Site] = []
    skipped: dict[str, str] = {}
    for site in every:
        barred = next((p for p in unwanted if fits(p, site.name)), None)
        fitting = [p for p in wanted if fits(p, site.name)]
        if wanted and not fitting:
            skipped[site.name] = "not included"
        elif barred is not None:
            skipped[site.name] = f"{BARRED} {barred!r}"
        elif site.adapter.asked and not any(map(_literal, fitting)):
            skipped[site.name] = f"{site.adapter.asked}; name it in include= to prune it"
        elif id(site.tensor) in twins and not any(map(_literal, fitting)):
            skipped[site.name] = "weight tied to another module; name it in include= to prune both"
        else:
            sites.append(site)
    return sites, skipped


def site_patterns(what: str, given: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the globs and regular expressions given as `what`, after checking that they are some."""
    if given is not None and not isinstance(given, Iterable):
        raise ZeroskipError(f"{what} is {given!r}: give globs or 're:...' as strings")
    patterns = (given,) if isinstance(given, str) else tuple(given or ())
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ZeroskipError(f"{what} holds {pattern!r}: give globs or 're:...' as strings")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ZeroskipError(f"{what} {pattern!r} is not a regular expression: {error}") from None
    return patterns


def fits(pattern: str, name: str) -> bool:
    """Whether a glob or "re:..." fits the name of a site."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rpartition(".")[2], pattern)


def _literal(pattern: str) -> bool:
    """Whether a pattern names its layer: no wildcard in the last part."""
    return not pattern.startswith("re:") and not set(pattern.rpartition(".")[2]) & set("*?[")


def every_site(model: nn.Module) -> list[Site]:
    """Return all sites of a model in module order, whether they are pruned by default or not; none without a weight."""
    found: list[Site] = []
    taken: set[int] = set()
    for name, module in model.named_modules():
        mine = [site for site in sites_in(name, module) if id(module) not in taken and site.tensor.numel()]
        # A child whose weight its parent computes with is never called: the weight is the parent's site.
        taken |= {id(module.get_submodule(s.parameter.rpartition(".")[0])) for s in mine if "." in s.parameter}
        found += mine
    return found


def tied(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """Return {id of a parameter: ids of all that share memory with it}, of those that two modules own.

    Two parameters on one storage are one weight where the bytes between their first and last element overlap; pieces
    of one buffer, or of one mapped file, are not.
    """
    owned = (parameter for module in model.modules() for parameter in module._parameters.values())
    groups: list[list[int]] = []
    place, end = "", 0
    for where, first, stop, this in sorted((*_span(p), id(p)) for p in owned if p is not None):
        if where == place and first < end:
            groups[-1].append(this)
            end = max(end, stop)
        else:
            groups.append([this])
            place, end = where, stop
    return {this: tuple(group) for group in groups if len(group) > 1 for this in group}


def _span(parameter: nn.Parameter) -> tuple[str, int, int]:
    """Return (device, first byte, end) of a parameter; what has no bytes of its own shares them with itself alone."""
    own = type(parameter) is nn.Parameter and parameter.layout is torch.strided and parameter.numel()
    if not own or parameter.device.type == "meta":
        return "", id(parameter), id(parameter) + 1
    last = sum((size - 1) * step for size, step in zip(parameter.shape, parameter.stride(), strict=True))
    first = parameter.data_ptr()
    return str(parameter.device), first, first + (last + 1) * parameter.element_size()


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside what torch.compile made of it; any other model is returned as it is."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # without it there is no such wrapper
    kind = getattr(dynamo, "OptimizedModule", None)
    return cast(nn.Module, model._orig_mod) if kind is not None and isinstance(model, kind) else model


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule `name` of `model`.

    Raises
    ------
    ZeroskipError
        If there is no such submodule.
    """
    parent, _, child = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
    except AttributeError:
        raise ZeroskipError(f"there is no module {parent!r} to hold {name!r}") from None
    if child not in owner._modules:
        raise ZeroskipError(f"there is no module {name!r}" + suggest(name, [n for n, _ in model.named_modules()]))
    owner._modules[child] = module

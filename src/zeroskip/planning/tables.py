"""Embeddings that a recipe has rounded: nothing is multiplied there, so they are packed without being measured."""

from __future__ import annotations

import torch
from torch import nn

from zeroskip.embedding_layers import PackedEmbedding, table_problem
from zeroskip.errors import ZeroskipError
from zeroskip.model import Site, every_site
from zeroskip.planning.candidates import NAMES, pack_as
from zeroskip.planning.site_plan import SitePlan
from zeroskip.planning.zeros import find_zeros
from zeroskip.quantize import LIMIT, kinds_of

__all__ = ["FORMAT", "build_table", "is_table", "table_plan", "tables"]

FORMAT = "dense"


def is_table(site: Site) -> bool:
    return isinstance(site.module, nn.Embedding)


def tables(model: nn.Module, precision: str | None = None) -> list[tuple[Site, str]]:
    """Return the embeddings of a model that can be packed, with the narrowest integers that hold each.

    Those that a recipe has rounded; not where a head shares the weight. None where a precision in floating point was
    asked for.
    """
    if precision is not None and precision not in LIMIT:
        return []
    sites = [site for site in every_site(model) if is_table(site) and table_problem(site.module) is None]
    found: list[tuple[Site, str]] = []
    for site in sites:
        if site.whole_scales is None or _shared(model, site) or site.tensor.device.type != "cpu":
            continue
        kinds = kinds_of(site.weight()[0], site.whole_scales[0])
        if kinds and site.tensor.dtype in NAMES:
            found.append((site, kinds[-1]))
    return found


def table_plan(site: Site, values: str) -> SitePlan:
    """Return the plan of one embedding."""
    weight = site.weight()[0]
    zeros = find_zeros(weight)
    size = weight.numel() * weight.element_size()
    return SitePlan(
        name=site.name,
        shape=(weight.shape[0], weight.shape[1]),
        dtype=NAMES[weight.dtype],
        pattern=zeros.pattern,
        sparsity=zeros.sparsity,
        format=FORMAT,
        values=values,
        kernels=[],
        reason=f"{FORMAT} {values}: the codes of an embedding, unpacked row by row; nothing is multiplied or measured",
        bytes_before=size,
        bytes_after=size,
        measured_at=site.name,
    )


def build_table(choice: SitePlan, site: Site) -> PackedEmbedding:
    """Return the packed embedding that a plan wants in the place of a site's.

    Raises
    ------
    ZeroskipError
        If the weight is not the one that the plan was made for.
    """
    with torch.inference_mode(False), torch.no_grad():
        weight = site.weight()[0].detach()
        try:
            return PackedEmbedding.of(pack_as(choice.format, weight, choice.values, site.whole_scales), weight.dtype)
        except ValueError as error:
            raise ZeroskipError(f"{choice.name}: the plan's {choice.label} does not fit: {error}") from error


def _shared(model: nn.Module, site: Site) -> bool:
    """Whether another module has the same weight."""
    owners = {id(m) for m in model.modules() for p in m._parameters.values() if p is site.tensor}
    return len(owners) > 1

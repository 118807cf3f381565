"""Permute the channels of one block: find what may change places, choose an order, fold it into the weights, check."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.calibrate import Block, in_fp32
from zeroskip.permute.find import Exchange, find_exchanges
from zeroskip.permute.probe import Probe
from zeroskip.permute.search import search
from zeroskip.permute.views import View, views_of
from zeroskip.prune.settings import Settings
from zeroskip.sites import Site

__all__ = ["Permuter", "permute_stats"]

log = logging.getLogger(__name__)

LAYERS = 48  # of a block: with more of them (experts as modules) the experiments would take too long
SAME = 1e-4  # relative; rounding is a hundredth of it, a wrong order a thousand times as much

Seen = Mapping[str, tuple[int, dict[str, Tensor]]]
Found = dict[str, Any]
"""What a row of the report says of a permutation."""


class Permuter:
    """Permutes the blocks of a model one after another; what was found in one serves all that are built alike."""

    def __init__(self) -> None:
        self.known: dict[Any, list[Exchange]] = {}

    def look(self, block: Block, args: Sequence[Any], kwargs: Mapping[str, Any], generator: torch.Generator) -> None:
        """Find out which channels of a block may change places, if no block of its kind was looked at before."""
        key = _kind(block)
        if key in self.known:
            return
        self.known[key] = []
        if len(key[1]) > LAYERS:
            log.warning("%s: has %d layers, too many to look for permutations", block.name, len(key[1]))
            return
        with in_fp32(block.module):
            probe = Probe(block.module, args, kwargs)
            for exchange in find_exchanges(probe, generator):
                order = _within(exchange.classes, generator)
                if _tried(probe, exchange, order, keep=False):
                    self.known[key].append(exchange)
                else:
                    log.info("%s: permuting %s changes its output", block.name, exchange.columns[0].site)

    def permute(
        self,
        block: Block,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        settings: Mapping[str, Settings],
        seen: Seen,
        generator: torch.Generator,
    ) -> tuple[dict[str, tuple[int, dict[str, Tensor]]], dict[str, Found]]:
        """Permute the weights of a block in place, for the patterns that its sites are about to get.

        Parameters
        ----------
        block : Block
            `look` has seen it.
        args, kwargs
            Of one call.
        settings : mapping
            By the sites' names in the model; layers that are not in it stay dense.
        seen : mapping
            {site: (tokens, statistics)}; not modified.
        generator : torch.Generator
            On the CPU.

        Returns
        -------
        dict, dict
            The statistics that the permuted weights have; {site: what to report}.
        """
        new, found = dict(seen), dict[str, Found]()
        exchanges = self.known[_kind(block)]
        if not exchanges:
            return new, found
        with in_fp32(block.module):
            probe = Probe(block.module, args, kwargs)
            for exchange in exchanges:
                started = time.perf_counter()
                views = _views(block, probe.sites, exchange, settings, new)
                if not views:
                    continue
                before = [view.kept() for view in views]
                order = search(views, exchange.classes, generator)
                after = [view.kept() for view in views]
                names = [f"{block.name}.{ends.site}".lstrip(".") for ends in (*exchange.columns, *exchange.rows)]
                if sum(after) <= sum(before) or not _tried(probe, exchange, order, keep=True):
                    continue
                for ends in exchange.columns:
                    name = f"{block.name}.{ends.site}".lstrip(".")
                    if name in new:
                        tokens, stats = new[name]
                        new[name] = (tokens, permute_stats(stats, _index(ends.at, order, probe.sites[ends.site])))
                told = {
                    "kept_before": sum(before) / len(before),
                    "kept": sum(after) / len(after),
                    "seconds": time.perf_counter() - started,
                }
                for name in names:
                    others = [other for other in dict.fromkeys(names) if other != name]
                    found[name] = {"with": others, **told}
        return new, found


def _kind(block: Block) -> tuple[type[nn.Module], tuple[tuple[str, tuple[int, ...]], ...]]:
    """What blocks that are built alike have in common."""
    shapes = ((name, tuple(each.shape)) for name, each in block.module.named_parameters() if each.dim() > 1)
    return type(block.module), tuple(shapes)


def _views(
    block: Block, sites: Mapping[str, Site], exchange: Exchange, settings: Mapping[str, Settings], seen: Seen
) -> list[View]:
    rows, columns = ({ends.site: ends.at for ends in side} for side in (exchange.rows, exchange.columns))
    views: list[View] = []
    if any(sites[name].scales is not None for name in (*rows, *columns)):
        return []  # the scales of integers stand at their columns
    for name in dict.fromkeys((*columns, *rows)):
        full = f"{block.name}.{name}".lstrip(".")
        if full in settings and full in seen:
            saliency = _saliency(sites[name], seen[full][1])
            pattern, sparsity = settings[full].pattern, settings[full].sparsity
            views += views_of(saliency, pattern, sparsity, rows.get(name), columns.get(name))
    return views


def _saliency(site: Site, stats: Mapping[str, Tensor]) -> Tensor:
    """Return [out, in]: the output error that each weight's absence would cause, or its square without statistics."""
    squares = site.weight()[0].float().square().cpu()
    if "gram" in stats:
        return squares * stats["gram"][0].diagonal().float().cpu()
    return squares * stats["sumsq"][0].float().cpu() if "sumsq" in stats else squares


def permute_stats(stats: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Return statistics [groups, in] and [groups, in, in] of inputs in a new order."""
    new = dict(stats)
    for name, value in stats.items():
        here = index.to(value.device)
        if value.dim() > 1:
            new[name] = value[:, here][:, :, here] if value.dim() == 3 else value[:, here]
    return new


def _tried(probe: Probe, exchange: Exchange, order: Tensor, keep: bool) -> bool:
    """Permute; return whether the consumers and the block still return the same. If not, or not to be kept: undo."""
    names = [ends.site for ends in exchange.columns]
    old = probe.outputs(names)
    _apply(probe.sites, exchange, order)
    same = all(_near(a, b) for a, b in zip(old, probe.outputs(names), strict=True))
    if not same or not keep:
        _apply(probe.sites, exchange, order.argsort())
    return same


def _near(old: Tensor, new: Tensor) -> bool:
    return bool((new - old).abs().max() <= SAME * old.abs().max())


@torch.no_grad()
def _apply(sites: Mapping[str, Site], exchange: Exchange, order: Tensor) -> None:
    """Let the unit order[s] stand in slot s, in producers' rows and biases and in consumers' columns."""
    for ends in exchange.rows:
        weight, bias = sites[ends.site].weight()[0], sites[ends.site].bias
        weight[ends.at] = weight[ends.at[order]]
        if bias is not None:
            bias[ends.at] = bias[ends.at[order]]
    for ends in exchange.columns:
        weight = sites[ends.site].weight()[0]
        weight.copy_(weight[:, _index(ends.at, order, sites[ends.site])])


def _index(at: Tensor, order: Tensor, site: Site) -> Tensor:
    """Return [in]: which old column comes where."""
    index = torch.arange(site.shape[2])
    index[at] = at[order]
    return index


def _within(classes: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random order that moves units within their classes."""
    order = torch.arange(len(classes))
    for kind in sorted(set(classes.tolist())):
        here = (classes == kind).nonzero().squeeze(1)
        order[here] = here[torch.randperm(len(here), generator=generator)]
    return order

"""The products of a language model alone: its linear layers in 4 bits, half of them zero, ours and other libraries'.

ONNX Runtime and OpenVINO run no whole models here, so that products are compared with products: each shape of the
blocks is raced as in `bench kernels`, checked first and with cold weights, and the times of all layers are added up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

from zeroskip.bench import peers
from zeroskip.bench.break_even import break_evens
from zeroskip.bench.contest import Contest
from zeroskip.bench.peers.environments import missing
from zeroskip.bench.peers.remote import PeerError, PeerProcess
from zeroskip.bench.results import Role, Row, Spread
from zeroskip.bench.roofline import rooflines
from zeroskip.bench.suites import Case, Zeros
from zeroskip.planning.report import table

__all__ = ["PRODUCTS_LEGEND", "Product", "Products", "added", "measure_products", "products_table", "shapes_of"]

VALUES, SPARSE, DENSE = "int4", "bitmask", "dense int4"
HALF = Zeros("unstructured", 0.5)
MORE = (Zeros("unstructured", 0.3), Zeros("unstructured", 0.7))  # for the break-even, at the fewest tokens
COLD_BYTES = 256 << 20
PRODUCTS_LEGEND = (
    "products: all linear layers of the blocks one after the other, half their weights zero; bytes of these weights; "
    "x: median of the rounds' ratios, of all shapes by their share of the time, between its quarters",
    "break-even: from how many zeros on the bitmask is faster than our dense layout of the same values",
)
Shapes = Mapping[tuple[int, int], int]


@dataclass(frozen=True)
class Product:
    """One layout at one token and thread count.

    Attributes
    ----------
    ms : float
        Of all layers, medians added up.
    nbytes : int
        Of their weights.
    faster_than : {layout: Spread}
        Of our layouts only.
    """

    tokens: int
    threads: int
    role: Role
    layout: str
    ms: float
    nbytes: int
    faster_than: dict[str, Spread] = field(default_factory=dict)


@dataclass
class Products:
    """What was found.

    Attributes
    ----------
    shapes : list of (m, k, how often)
    found : list of Product
    break_evens : list of str
    names : list of str
        Peers that took part.
    missing : {peer or layout: why it has no time}
    """

    shapes: list[tuple[int, int, int]] = field(default_factory=list)
    found: list[Product] = field(default_factory=list)
    break_evens: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def shapes_of(model: nn.Module) -> Counter[tuple[int, int]]:
    """Return how often each weight [m, k] occurs in the blocks: every nn.Linear but the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
    return Counter((module.out_features, module.in_features) for module in layers)


def measure_products(
    shapes: Shapes,
    names: Sequence[str],
    tokens: Sequence[int],
    threads: Sequence[int],
    race_s: float,
    progress: Callable[[str], None] = lambda what: None,
) -> Products:
    """Race the shapes.

    Parameters
    ----------
    shapes : {(m, k): how often}
    names : sequence of str
        Peers that take part where they are installed, have a mode of 4 bits and run no whole models.
    tokens, threads : sequence of int
    race_s : float
        Seconds of each race.
    progress : callable
        Told what comes next.
    """
    told = Products([(m, k, count) for (m, k), count in shapes.items()])
    total, before = sum(m * k * count for (m, k), count in shapes.items()), torch.get_num_threads()
    rows: list[Row] = []
    few = min(tokens)
    try:
        limits = {one.threads: one for one in rooflines(threads, 0.1)}
        with ExitStack() as stack:
            processes = _started(names, stack, told)
            for (m, k), zeros in ((shape, zeros) for shape in shapes for zeros in (HALF, *MORE)):
                counts, others = (tokens, processes) if zeros is HALF else ((few,), {})
                contest = Contest(Case("", m, k, zeros, total), (SPARSE,), COLD_BYTES, race_s, others, VALUES)
                for count in threads:
                    torch.set_num_threads(count)
                    for size in counts:
                        progress(f"products {m}x{k}, {zeros.sparsity:.0%} zeros, {size} tokens, {count} threads")
                        rows += contest.rows(size, limits[count])
                contest.close()
    finally:
        torch.set_num_threads(before)
    told.missing |= {row.layout: f"{row.m}x{row.k}: {row.problem}" for row in rows if row.problem is not None}
    told.found = added(shapes, [row for row in rows if round(row.sparsity, 2) == HALF.sparsity])
    told.break_evens = [
        f"{one.threads} threads, {one.found.tokens} tokens: {one}" for one in break_evens(rows) if one.rival == DENSE
    ]
    return told


def added(shapes: Shapes, rows: Sequence[Row]) -> list[Product]:
    """Return one line for each layout that has a time for every shape, at each token and thread count."""
    found: list[Product] = []
    timed = [row for row in rows if row.ms is not None]
    for threads, tokens, layout in dict.fromkeys((row.threads, row.tokens, row.layout) for row in timed):
        mine = {(r.m, r.k): r for r in timed if (r.threads, r.tokens, r.layout) == (threads, tokens, layout)}
        if set(mine) != set(shapes):
            continue
        spent = {shape: (mine[shape].ms or 0.0) * count for shape, count in shapes.items()}
        total = sum(spent.values())
        others = set.intersection(*(set(row.faster_than) for row in mine.values()))
        ratios = {
            other: Spread(*(
                sum(spent[shape] * getattr(mine[shape].faster_than[other], part) for shape in shapes) / total
                for part in ("value", "low", "high")
            ))
            for other in sorted(others - {"best dense"})
        }  # fmt: skip
        one = next(iter(mine.values()))
        nbytes = sum(mine[shape].nbytes * count for shape, count in shapes.items())
        found.append(Product(tokens, threads, one.role, layout, total, nbytes, ratios))
    return sorted(found, key=lambda each: (each.threads, each.tokens, each.ms))


def products_table(told: Products) -> list[str]:
    """Return the lines of a table."""
    others = list(dict.fromkeys(name for each in told.found for name in each.faster_than))
    lines = []
    for each in told.found:
        ratios = [each.faster_than.get(name) for name in others]
        versus = ["-" if r is None else f"{r.value:.2f} ({r.low:.2f}-{r.high:.2f})" for r in ratios]
        lines.append(
            [str(each.threads), str(each.tokens), each.layout, f"{each.ms:.2f}", f"{each.nbytes / 1e6:.1f}", *versus]
        )
    header = ["threads", "tokens", "layout", "ms", "MB", *(f"x {name}" for name in others)]
    return [*table(header, lines), *(f"break-even, {line}" for line in told.break_evens)]


def _started(names: Sequence[str], stack: ExitStack, told: Products) -> dict[str, PeerProcess]:
    running: dict[str, PeerProcess] = {}
    for name in names:
        peer = peers.get(name)
        if peer.model_modes or all(mode.bits != 4 for mode in peer.modes):
            continue
        why = missing(name)
        if why is None:
            try:
                process = stack.enter_context(PeerProcess(name))
                process.version()
                running[name] = process
                told.names.append(name)
                continue
            except (PeerError, OSError) as error:
                why = str(error)
        told.missing[name] = why
    return running

"""The way through the blocks of a model: collect, prune, let block solvers work, record, go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn

from zeroskip.calibrate import (
    Batch,
    Block,
    Collector,
    Journal,
    Replay,
    SharingError,
    Teacher,
    sites_of,
)
from zeroskip.calibrate.journal import generator
from zeroskip.model import Site
from zeroskip.prune.report import Report, Row
from zeroskip.prune.settings import Plan
from zeroskip.prune.site import prune_site

__all__ = ["calibrated", "collect", "plainly"]

log = logging.getLogger(__name__)

UNSEEN = "saw no calibration token"
SCALES = "scales"


def plainly(
    model: nn.Module,
    plan: Plan,
    sites: list[Site],
    blocks: list[Block],
    found: dict[str, dict[str, Tensor]],
    book: Journal | None,
    report: Report,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    """Prune without running blocks."""
    for index, block in enumerate(blocks):
        _tell(progress, index, len(blocks), block)
        inside = sites_of(block, sites)
        if not _resumed(book, index, model, inside, report):
            rows = _pruned(plan, inside, {site.name: (0, found.get(site.name, {})) for site in inside})
            _finish(book, index, model, block, inside, rows, report)
    _tell(progress, len(blocks), len(blocks), None)


def calibrated(
    model: nn.Module,
    plan: Plan,
    sites: list[Site],
    blocks: list[Block],
    batches: list[Batch],
    found: dict[str, dict[str, Tensor]],
    book: Journal | None,
    report: Report,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    """Prune block after block, each on what the pruned blocks before it give."""
    replay = Replay(model, blocks, batches, plan.settings["seed"])
    called = {site.name for block in replay.order for site in sites_of(block, sites)}
    lost = [site for site in sites if site.name not in called]
    if lost:
        # Lists whose items are used but never called: their sites, where called, are blocks of their own.
        replay = Replay(model, [*replay.order, *(Block(s.name, s.module, s.name) for s in lost)], batches, replay.seed)
    last = max((i for i, block in enumerate(replay.order) if sites_of(block, sites)), default=-1)
    teacher = Teacher(replay) if plan.recipe.block_solvers else None
    for index, block in enumerate(replay.order[: last + 1]):
        _tell(progress, index, last + 1, block)
        inside = sites_of(block, sites)
        if teacher is not None:
            teacher.learn(block)
        if not _resumed(book, index, model, inside, report):
            seen = collect(replay, block, inside, plan.recipe.needs) if inside else {}
            seen = {name: (tokens, stats | found.get(name, {})) for name, (tokens, stats) in seen.items()}
            rows = _pruned(plan, inside, seen)
            if teacher is not None and rows:
                rows[0].notes += _taught(plan, replay, block, inside, teacher)
            _finish(book, index, model, block, inside, rows, report)
        if index < last:
            replay.advance(block)
    _tell(progress, last + 1, last + 1, None)
    done = {row.name for row in report.rows}
    report.skipped |= {site.name: UNSEEN for site in sites if site.name not in done}
    for name in (site.name for site in sites if site.name not in done):
        log.warning("%s %s and stays dense", name, UNSEEN)


def _tell(progress: Callable[[int, int, str], None] | None, done: int, total: int, block: Block | None) -> None:
    name = "" if block is None else block.name or "model"
    log.info("block %d of %d %s", done, total, name)
    if progress is not None:
        progress(done, total, name)


def collect(
    replay: Replay, block: Block, sites: list[Site], needs: tuple[str, ...], share: bool = True
) -> dict[str, tuple[int, dict[str, Tensor]]]:
    """Return {site: (tokens, statistics)} of the sites of one block over all batches."""
    running = 0

    def visible(x: Tensor) -> Tensor | None:
        return replay.batches[running].visible(x, replay.arguments, replay.two_towers)

    collector = Collector(sites, needs, visible, share)
    try:
        for running in range(len(replay.batches)):
            collector.next_run()
            replay.collect(block, running)
        return {site.name: collector.result(site) for site in sites}
    except SharingError:
        collector.close()
        return collect(replay, block, sites, needs, share=False)
    finally:
        collector.close()


def _pruned(plan: Plan, sites: list[Site], seen: Mapping[str, tuple[int, dict[str, Tensor]]]) -> list[Row]:
    """Prune the sites of a block; those that saw no token stay as they are."""
    return [
        prune_site(site, plan, seen[site.name][1], seen[site.name][0])
        for site in sites
        if seen[site.name][0] or not plan.recipe.needs_data
    ]


def _taught(plan: Plan, replay: Replay, block: Block, sites: list[Site], teacher: Teacher) -> list[str]:
    """Let the block solvers work on a pruned block."""
    draw = generator(plan.settings["seed"], block.name, torch.device("cpu"))
    lessons = [partial(teacher.lesson, block, index) for index in range(len(replay.batches))]
    return [note for solver in plan.recipe.block_solvers for note in solver.refine(block, sites, lessons, draw)]


def _resumed(book: Journal | None, index: int, model: nn.Module, sites: list[Site], report: Report) -> bool:
    """Write the parameters that the journal holds for this block, if it does."""
    found = book.load(index) if book is not None else None
    if found is None:
        return False
    values, rows = found
    scales = {site.name: values.pop(f"{site.name}:{SCALES}", None) for site in sites}
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
    for site in sites:
        site.keep_scales(scales[site.name])
    report.rows += [Row(**row) for row in rows]
    return True


def _finish(
    book: Journal | None,
    index: int,
    model: nn.Module,
    block: Block,
    sites: list[Site],
    rows: list[Row],
    report: Report,
) -> None:
    """Record a finished block: its parameters, and the scales of the sites that are quantised."""
    if book is not None:
        inside = {id(parameter) for parameter in block.module.parameters()} if rows else set()
        values = {name: value for name, value in model.named_parameters() if id(value) in inside}
        scales = {f"{site.name}:{SCALES}": site.scales for site in sites if site.scales is not None}
        book.record(index, values | scales, [asdict(row) for row in rows])
    report.rows += rows

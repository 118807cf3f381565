"""`prune`: check everything, then block by block: collect, choose, solve, write, go on."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

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
    find_blocks,
    read_batches,
    sites_of,
    text_batches,
)
from zeroskip.calibrate.journal import generator
from zeroskip.errors import ZeroskipError
from zeroskip.model import Site, select_sites, unwrapped
from zeroskip.prune.base import Loss, Survey
from zeroskip.prune.report import Report, Row
from zeroskip.prune.settings import Plan, check_sites, read_plan
from zeroskip.prune.site import prune_site

__all__ = ["collect", "prune"]

log = logging.getLogger(__name__)

OUTSIDE = "outside the blocks; name it in include= to prune it"
UNSEEN = "saw no calibration token"
SCALES = "scales"


def prune(
    model: nn.Module,
    method: str = "wanda+ls",
    *,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    calibration: Iterable[Any] | None = None,
    text: str | os.PathLike[str] | Iterable[str] | None = None,
    tokenizer: Any = None,
    recipe: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    values: str | None = None,
    group_size: int | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = ("lm_head",),
    journal: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Set weights of a model to zero, in place, so that its outputs change as little as can be.

    Parameters
    ----------
    model : nn.Module
        Modified in place: nn.Linear and transformers' Conv1D inside its blocks. Its weights may be fp32, bf16 or fp16;
        the work is done in fp32. The report is also set as `model.zeroskip_report`.
    method : str
        One of `methods()`.
    sparsity : float, optional
        Fraction of zeros in [0, 1); implied by N:M patterns.
    pattern : str
        "unstructured", "N:M", "N:M@V" or "block:RxC".
    calibration : iterable of batches, optional
        A batch is a tensor (the one positional argument), a tuple (positional) or a dict (by keyword). Read once.
        Tokens where `attention_mask` is 0 count in no statistic.
    text, tokenizer : optional
        Instead of `calibration`: see `zeroskip.calibrate.text_batches`.
    recipe : dict, optional
        {"method", "pattern", "sparsity", "include", "exclude", "seed", "values", "group_size"}, any of them, instead
        of the arguments.
    loss : callable, optional
        (model's output, `zeroskip.calibrate.Batch`) -> scalar, for methods that need gradients (snip, grasp). A
        causal language model has a default: the next token's cross-entropy.
    values, group_size : optional
        For methods that quantise (gptq, sparsegpt+gptq): "int4" (the default) or "int8", and how many inputs of a row
        share a scale: 32, 64 (the default) or 128. The scales stay with the module as `zeroskip_scales`.
    include, exclude : patterns, optional
        Globs on site names, "re:..." for regular expressions: see `zeroskip.model.find_sites`. Sites outside the
        blocks are pruned only where `include` names them.
    journal : path, optional
        A directory. The same call, killed and made again on the same model, goes on from it, with the same result.
    seed : int
    progress : callable, optional
        Told (blocks done, blocks in all, name of the block that comes) as the work goes on.

    Returns
    -------
    Report

    Raises
    ------
    ZeroskipError
        On anything that does not fit; all of it is checked before the first weight changes, except calibration data
        that makes the model itself produce NaN or Inf.

    Examples
    --------
    >>> report = prune(model, "wanda+ls", pattern="8:16@64", calibration=batches)
    >>> print(report)

    Source: block by block with the pruned outputs fed on, as in Frantar and Alistarh 2023 (arXiv 2301.00774).
    """
    started = time.perf_counter()
    given = {
        "method": method,
        "sparsity": sparsity,
        "pattern": pattern,
        "include": include,
        "exclude": exclude,
        "seed": seed,
        "values": values,
        "group_size": group_size,
    }
    plan = read_plan(given, recipe)
    if loss is not None and not plan.recipe.method.batched:
        raise ZeroskipError(
            f"loss= is for methods that need gradients, which {plan.recipe.name!r} does not: leave it out"
        )
    model = unwrapped(model)
    sites, skipped = select_sites(model, plan.settings["include"], plan.settings["exclude"])
    blocks = find_blocks(model, sites if plan.settings["include"] else ())
    inside = {site.name for block in blocks for site in sites_of(block, sites)}
    skipped |= {site.name: OUTSIDE for site in sites if site.name not in inside}
    sites = [site for site in sites if site.name in inside]
    if not sites:
        raise ZeroskipError(
            "the model has nothing to prune: no nn.Linear or Conv1D is left"
            + (f" ({len(skipped)} skipped, e.g. {next(iter(skipped.items()))})" if skipped else "")
        )
    check_sites(sites, plan)
    if calibration is not None and text is not None:
        raise ZeroskipError("give calibration= or text=, not both")
    if text is not None:
        calibration = text_batches(model, text, tokenizer, plan.settings["seed"])
    if plan.recipe.needs_data and calibration is None:
        raise ZeroskipError(
            f"method {plan.recipe.name!r} needs data: give calibration= batches, or text= and tokenizer="
        )

    report = Report(plan.settings, skipped=skipped)
    batches: list[Batch] = []
    surveys = plan.recipe.method.surveys
    if plan.recipe.needs_data or (surveys and calibration is not None):
        one_logit = not surveys and all(block.name != block.group for block in blocks)
        batches = read_batches(model, calibration, one_logit)
    with _evaluating(model):
        book = Journal(journal, model, plan.settings, batches) if journal is not None else None
        found: dict[str, dict[str, Tensor]] = {}
        if surveys:
            seed = plan.settings["seed"]
            found = plan.recipe.method.survey(Survey(model, sites, batches, loss, plan.pattern, plan.sparsity, seed))
        if plan.recipe.needs_data:
            _calibrated(model, plan, sites, blocks, batches, found, book, report, progress)
        else:
            _plainly(model, plan, sites, blocks, found, book, report, progress)
    if not report.rows:
        raise ZeroskipError(f"nothing was pruned: every site {UNSEEN}; give data that reaches the model's blocks")
    order = {site.name: index for index, site in enumerate(sites)}
    report.rows.sort(key=lambda row: order[row.name])
    report.seconds = time.perf_counter() - started
    object.__setattr__(model, "zeroskip_report", report)
    return report


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# The work -----------------------------------------------------------------------------------------------------------


def _plainly(
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


def _calibrated(
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

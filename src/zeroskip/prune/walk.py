"""The way through the blocks of a model: collect, prune, let block solvers work, record, go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.calibrate import Batch, Block, Journal, Replay, Teacher, collect, sites_of
from zeroskip.calibrate.blocks import alone
from zeroskip.calibrate.journal import generator
from zeroskip.model import Site
from zeroskip.permute import Permuter
from zeroskip.prune.plan import Plan
from zeroskip.prune.report import Report, Row
from zeroskip.prune.rotate import rotate
from zeroskip.prune.site import SHORT, prune_site

__all__ = ["UNSEEN", "Walk", "replay_of"]

log = logging.getLogger(__name__)

UNSEEN = "saw no calibration token"
STATISTICS = 128  # batches, where block solvers follow: those see every batch, and make up for what these do not show

Seen = Mapping[str, tuple[int, dict[str, Tensor]]]
"""{site: (tokens, {statistic: [groups, ...]})}"""


class Walk:
    """One way through the blocks of a model, pruning it in place.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    plan : Plan
    found : mapping
        What surveys found: {site: {statistic: [groups, ...]}}.
    report : Report
        Gets the rows, and the sites that were left out.
    journal : Journal or None
        Finished blocks are taken from it and recorded in it.
    progress : callable or None
        Told (blocks done, blocks in all, name of the block that comes).
    stream : bool
        Whether blocks are mapped from the journal once they are finished, so that only one of them is in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        found: Mapping[str, dict[str, Tensor]],
        report: Report,
        journal: Journal | None = None,
        progress: Callable[[int, int, str], None] | None = None,
        stream: bool = False,
    ) -> None:
        self.model, self.plan, self.found, self.report = model, plan, found, report
        self.journal, self.progress, self.stream = journal, progress, stream
        self.warned = False
        self.permuter = Permuter() if plan.recipe["permute"] else None

    def plainly(self) -> None:
        """Prune without running blocks."""
        self._plainly(self.plan.blocks, 0, len(self.plan.blocks))
        self._tell(len(self.plan.blocks), len(self.plan.blocks), None)

    def calibrated(self, batches: list[Batch]) -> None:
        """Prune block after block, each on what the pruned blocks before it give."""
        plan = self.plan
        # What needs no data and stands outside the lists of blocks comes first: embeddings feed the blocks, and a head
        # need not run.
        first = [block for block in plan.blocks if block.name == block.group and self._free(block)]
        known = {site.name for block in first for site in sites_of(block, plan.sites)}
        sites = [site for site in plan.sites if site.name not in known]
        later = [block for block in plan.blocks if block not in first]
        replay = replay_of(self.model, later, sites, batches, plan.seed)
        last = max((i for i, block in enumerate(replay.order) if sites_of(block, sites)), default=-1)
        reached = {site.name for block in replay.order[: last + 1] for site in sites_of(block, sites)}
        late = alone([], [site for site in sites if site.name not in reached])
        rest = [block for block in late if self._free(block)]
        start, stop = len(first), len(first) + last + 1
        total = stop + len(rest) + plan.whole
        teacher = Teacher(replay) if plan.block_solvers(sites) or plan.whole else None
        self._plainly(first, 0, total)
        for index, block in enumerate(replay.order[: last + 1], start):
            self._tell(index, total, block)
            if teacher is not None:
                teacher.learn(block)
            inside = sites_of(block, sites)
            if self.permuter is not None and inside:
                self.permuter.look(block, *replay.call_of(block, 0), self._draw(block))
            if not self._resumed(index, inside):
                self._own(block, inside)
                notes = self._rotated(replay, block, inside)
                seen, permuted = self._permuted(replay, block, self._collected(replay, block, inside))
                rows = self._pruned(inside, seen)
                for row in rows:
                    row.notes += notes.get(row.name, [])
                    row.permuted = permuted.get(row.name)
                if teacher is not None and rows:
                    rows[0].notes += self._taught(replay, block, inside, teacher)
                self._finish(index, block, inside, rows)
            if index < stop - 1:
                replay.advance(block)
        self._plainly(rest, stop, total)
        if teacher is not None and plan.whole:
            self._whole(replay, sites, teacher, total)
        self._tell(total, total, None)
        done = {row.name for row in self.report.rows}
        for site in sites:
            if site.name not in done:
                self.report.skipped[site.name] = UNSEEN
                log.warning("%s %s and stays dense", site.name, UNSEEN)

    def _free(self, block: Block) -> bool:
        """Whether a block holds sites, none of which needs data."""
        inside = sites_of(block, self.plan.sites)
        return bool(inside) and not any(self.plan.settings[s.name].composition.needs_data for s in inside)

    def _plainly(self, blocks: Sequence[Block], first: int, total: int) -> None:
        for index, block in enumerate(blocks, first):
            self._tell(index, total, block)
            inside = sites_of(block, self.plan.sites)
            if not self._resumed(index, inside):
                self._own(block, inside)
                rows = self._pruned(inside, {site.name: (0, self.found.get(site.name, {})) for site in inside})
                self._finish(index, block, inside, rows)

    def _tell(self, done: int, total: int, block: Block | None) -> None:
        name = "" if block is None else block.name or "model"
        log.info("block %d of %d %s", done, total, name)
        if self.progress is not None:
            self.progress(done, total, name)

    def _rotated(self, replay: Replay, block: Block, sites: list[Site]) -> dict[str, list[str]]:
        if not self.plan.recipe["rotate"]:
            return {}
        patterns = {site.name: self.plan.settings[site.name].pattern for site in sites}
        notes = rotate(replay, block, sites, patterns)
        return notes or {site.name: ["nothing to rotate in this block: no values were found"] for site in sites[:1]}

    def _permuted(self, replay: Replay, block: Block, seen: Seen) -> tuple[Seen, dict[str, dict[str, Any]]]:
        if self.permuter is None or not seen:
            return seen, {}
        args, kwargs = replay.call_of(block, 0)
        return self.permuter.permute(block, args, kwargs, self.plan.settings, seen, self._draw(block))

    def _draw(self, block: Block) -> torch.Generator:
        return generator(self.plan.seed, block.name, torch.device("cpu"))

    def _collected(self, replay: Replay, block: Block, sites: list[Site]) -> Seen:
        if not sites:
            return {}
        needs = {site.name: self.plan.settings[site.name].composition.needs for site in sites}
        learning = self.plan.whole or self.plan.block_solvers(sites)
        seen = collect(replay, block, sites, needs, most=STATISTICS if learning else None)
        return {name: (tokens, stats | self.found.get(name, {})) for name, (tokens, stats) in seen.items()}

    def _pruned(self, sites: list[Site], seen: Seen) -> list[Row]:
        """Prune the sites of a block; those that saw no token they need stay as they are."""
        rows = []
        for site in sites:
            settings = self.plan.settings[site.name]
            tokens, stats = seen[site.name]
            if tokens or not settings.composition.needs_data:
                draw = generator(self.plan.seed, site.name, site.weight().device)
                rows.append(prune_site(site, settings, stats, tokens, draw))
                short = [note for note in rows[-1].notes if note.startswith(SHORT)]
                if short and not self.warned:
                    log.warning("%s: %s (the report names every such layer)", site.name, short[0])
                    self.warned = True
        return rows

    def _taught(self, replay: Replay, block: Block, sites: list[Site], teacher: Teacher) -> list[str]:
        """Let the block solvers work on a pruned block."""
        draw = self._draw(block)
        lessons = [partial(teacher.lesson, block, index) for index in range(len(replay.batches))]
        found = self.plan.block_solvers(sites)
        return [note for solver, theirs in found for note in solver.refine(block, [block], theirs, lessons, draw)]

    def _whole(self, replay: Replay, sites: list[Site], teacher: Teacher, total: int) -> None:
        """Let solvers of the whole model work on it, as the last of `total` steps."""
        every = Block("", self.model, "")
        self._tell(total - 1, total, every)
        notes = self._recalled(total - 1, [])
        if notes is None:
            lessons = [partial(teacher.final, index) for index in range(len(replay.batches))]
            done = {row.name for row in self.report.rows}
            notes, changed = [], []
            for solver, theirs in self.plan.block_solvers([s for s in sites if s.name in done], whole=True):
                parts = [block for block in replay.order if sites_of(block, theirs)]
                notes += solver.refine(every, parts, theirs, lessons, self._draw(every))
                changed += parts
            self._record(total - 1, changed, {}, notes)
        for row in self.report.rows[:1]:
            row.notes += notes

    def _own(self, block: Block, sites: list[Site]) -> None:
        """Streaming, give a block memory of its own, because pages of a mapped file stay there once written to."""
        if self.stream and sites:
            for parameter in block.module.parameters():
                parameter.data = parameter.data.clone()

    def _resumed(self, index: int, sites: list[Site]) -> bool:
        """Take a block from the journal, if it is there, and its rows into the report."""
        rows = self._recalled(index, sites)
        self.report.rows += [Row(**row) for row in rows or ()]
        return rows is not None

    def _recalled(self, index: int, sites: list[Site]) -> Any:
        """Write the parameters that the journal holds for a step and return what was said of it, or None."""
        found = self.journal.load(index) if self.journal is not None else None
        if found is None:
            return None
        values, scales, said = found
        self._put(values)
        for site in sites:
            site.keep_scales(scales.get(site.name))
        return said

    def _put(self, values: Mapping[str, Tensor]) -> None:
        """Give parameters the values of a finished block; streaming, the mapped tensors themselves."""
        for name, value in values.items():
            parameter = self.model.get_parameter(name)
            if self.stream and parameter.device.type == "cpu" and parameter.dtype == value.dtype:
                parameter.data = value
            else:
                with torch.no_grad():
                    parameter.copy_(value)

    def _finish(self, index: int, block: Block, sites: list[Site], rows: list[Row]) -> None:
        """Record a finished block, and take its rows into the report."""
        scales = {site.name: site.scales for site in sites if site.scales is not None}
        self._record(index, [block] if rows else [], scales, [asdict(row) for row in rows])
        found = self.journal.load(index) if self.journal is not None and self.stream else None
        if found is not None:
            self._put(found[0])
        self.report.rows += rows

    def _record(self, index: int, blocks: Sequence[Block], scales: Mapping[str, Tensor], said: Any) -> None:
        """Write the parameters of these blocks into the journal, with the scales of the sites that are quantised."""
        if self.journal is not None:
            inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
            values = {name: value.detach() for name, value in self.model.named_parameters() if id(value) in inside}
            self.journal.record(index, values, scales, said)


def replay_of(model: nn.Module, blocks: list[Block], sites: Sequence[Site], batches: list[Batch], seed: int) -> Replay:
    """Return a replay whose blocks hold every site that is called."""
    replay = Replay(model, blocks, batches, seed)
    called = {site.name for block in replay.order for site in sites_of(block, sites)}
    lost = [site for site in sites if site.name not in called]
    if lost:
        # Lists whose items are used but never called: their sites, where called, are blocks of their own.
        replay = Replay(model, [*replay.order, *alone(replay.order, lost)], batches, seed)
    return replay
